"""Dalmia et al. 2023: adapters of several tasks in every layer of a Conformer, combined without a task id by one of three rules.

Checked on a Conformer. The paper gives no biases of Q and K; those of `fusion` start at zero, and that of the keys never acts.
"""

from __future__ import annotations

import pytest
import torch
from adapter_models import perturbed, spread
from routing_models import members, set_value
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForSequenceClassification

import graftwork as gw

pytestmark = pytest.mark.system("audio-adapterfusion")

RULES = [gw.Uniform, gw.Weighted, gw.Fusion]
ADAPTER = gw.Pfeiffer(d=4)  # h + U relu(D LN(h)) on the output of every layer


def conformer(layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Wav2Vec2ConformerConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, conv_dim=(16,),
        conv_kernel=(8,), conv_stride=(8,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        layerdrop=0.0, mask_time_prob=0.0, classifier_proj_size=8, num_labels=3,
    )  # fmt: skip
    return perturbed(Wav2Vec2ConformerForSequenceClassification(config)).eval()


def sound(seed: int = 3) -> torch.Tensor:
    return torch.randn(2, 160, generator=torch.Generator().manual_seed(seed))


def frames(model, expression) -> torch.Tensor:
    """The states [batch, frames, d] behind the last layer."""
    with torch.no_grad(), gw.using(model, expression):
        return model(sound(), output_hidden_states=True).hidden_states[-1]


def after_first(model, expression) -> torch.Tensor:
    """h' of a model of one layer, as the layer gives it."""
    seen = {}
    hook = model.wav2vec2_conformer.encoder.layers[0].register_forward_hook(
        lambda m, a, out: seen.__setitem__("h", out[0] if isinstance(out, tuple) else out)
    )
    frames(model, expression)
    hook.remove()
    return seen["h"]


def copies(model, names: str) -> torch.nn.Module:
    members(model, ADAPTER, names)
    first, *others = names
    for other in others:
        for p, q in zip(gw.adapters(model)[other].parameters(), gw.adapters(model)[first].parameters(), strict=True):
            p.data = q.data.clone()
    return model


@pytest.mark.parametrize("expression", ["mean(a, b, c)", 'route(a, b, c, by="uniform")', "weighted", "fusion"])
def test_audio_adapterfusion__copies_of_one_adapter_are_it(expression):
    model = copies(conformer(), "abc")
    gw.graft(model, gw.Weighted(of=["a", "b", "c"]), "weighted", head=False)
    set_value(gw.graft(model, gw.Fusion(of=["a", "b", "c"]), "fusion", head=False), torch.eye)
    torch.testing.assert_close(frames(model, expression), frames(model, "a"), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(frames(model, "a"), frames(model, None), atol=1e-2)


def test_audio_adapterfusion__rules_start_at_the_mean():
    model = members(conformer(layers=1), ADAPTER, "abc")
    mean = sum(after_first(model, name) for name in "abc") / 3
    weighted = gw.graft(model, gw.Weighted(of=["a", "b", "c"]), "w", head=False)
    assert [p.shape for p in weighted.parameters()] == [(3,)] and not any(p.any() for p in weighted.parameters())
    for expression in ("mean(a, b, c)", 'route(a, b, c, by="uniform")', "w"):
        torch.testing.assert_close(after_first(model, expression), mean, atol=1e-5, rtol=1e-5)


def test_audio_adapterfusion__one_hot_weights_choose_an_adapter():
    model = members(conformer(), ADAPTER, "abc")
    adapter = gw.graft(model, gw.Weighted(of=["a", "b", "c"]), "w", head=False)
    alone = {name: frames(model, name) for name in "abc"}
    for i, name in enumerate("abc"):
        for p in adapter.parameters():
            p.data = torch.tensor([1e4 if j == i else 0.0 for j in range(3)])
        torch.testing.assert_close(frames(model, "w"), alone[name], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-2)


def test_audio_adapterfusion__weights_are_a_softmax_per_layer():
    model = members(conformer(layers=1), ADAPTER, "abc")
    adapter = gw.graft(model, gw.Weighted(of=["a", "b", "c"]), "w", head=False)
    (logits,) = adapter.parameters()
    logits.data = torch.tensor([0.3, -1.0, 2.0])
    wanted = sum(s * after_first(model, name) for s, name in zip(torch.softmax(logits.detach(), 0), "abc", strict=True))
    torch.testing.assert_close(after_first(model, "w"), wanted, atol=1e-5, rtol=1e-5)


def test_audio_adapterfusion__attention_does_not_see_the_order_of_the_adapters():
    model = members(conformer(), ADAPTER, "abc")
    one = gw.graft(model, gw.Fusion(of=["a", "b", "c"], residual=True), "abc", head=False)
    two = gw.graft(model, gw.Fusion(of=["c", "a", "b"], residual=True), "cab", head=False)
    spread(one)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        q.data = p.data.clone()
    torch.testing.assert_close(frames(model, "cab"), frames(model, "abc"), atol=1e-5, rtol=1e-5)
    means = []
    for name in ("abc", "cab"):
        gw.activate(model, name)
        with gw.mixing_weights(model) as w, torch.no_grad():
            model(sound())
        means.append(w)
    for place, of in means[0].items():
        assert of == pytest.approx(means[1][place], abs=1e-5)
        assert max(of.values()) - min(of.values()) > 0.05


def test_audio_adapterfusion__attention_over_equal_adapters_is_v_of_their_output():
    model = copies(conformer(layers=1), "abc")
    adapter = gw.graft(model, gw.Fusion(of=["a", "b", "c"], residual=True), "f", head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    torch.testing.assert_close(
        after_first(model, "f"), after_first(model, "a") @ delta.value.detach().mT, atol=1e-4, rtol=1e-4
    )
    assert adapter.num_parameters == 3 * 32**2 + 2 * 32


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_audio_adapterfusion__two_stages_leave_the_adapters_and_joint_training_does_not(rule, joint):
    model = members(conformer(), ADAPTER, "ab")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    by_id = {name: frames(model, name) for name in "ab"}
    gw.graft(model, rule(of=["a", "b"], joint=joint), "f")  # with the head
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    (model(sound(), labels=torch.tensor([0, 2])).loss + gw.auxiliary_loss(model)).backward()
    optimizer.step()
    model.eval()
    after = dict(model.named_parameters())
    moved = {n for n, p in before.items() if not torch.equal(p, after[n])}
    of_adapters = {n for n in before if "graft" in n.split(".")}
    if joint:
        assert moved and moved <= of_adapters
        assert not torch.equal(frames(model, "a"), by_id["a"])
    else:
        assert not moved
        assert all(torch.equal(frames(model, name), out) for name, out in by_id.items())
