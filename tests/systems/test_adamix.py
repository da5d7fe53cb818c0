"""Wang et al. 2022: copies of an adapter, drawn pass by pass, kept consistent, and one adapter at the end."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, bert_of, closed_form, gpt2, ids, llama, on_meta, spread, t5
from safetensors.torch import load_file
from transformers import RobertaConfig, RobertaForSequenceClassification

import graftwork as gw
from graftwork.combinators.adamix import symmetric_kl
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("adamix")
LABELS = torch.tensor([0, 1])


def quiet(**more):
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more)


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def grafted(model, **options):
    """An AdaMix adapter away from its initial values, without a second pass unless asked for."""
    adapter = gw.graft(model, gw.AdaMix(**{"consistency": 0.0} | options), head=False)
    spread(adapter)
    return adapter


def copies(delta, name: str) -> list[torch.Tensor]:
    return delta.every().get(name, [])


# -- 1. the mean of the copies


def test_adamix__evaluation_is_the_bottleneck_of_the_mean_weights():
    """Parameters are averaged, not outputs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)).eval()
    adapter = grafted(model, of=gw.Bottleneck(d=4), at="/^0$/", share="none", copies=3)
    (delta,) = adapter.deltas()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    h = F.linear(x, model[0]._parameters["weight"], model[0]._parameters["bias"])
    named = {n: copies(delta, n) for n in ("down", "down_bias", "up", "up_bias")}
    assert all(len(c) == 3 for c in named.values())

    def output(p):
        return model[2](torch.tanh(h + F.gelu(h @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]))

    with torch.no_grad():
        merged = output({n: torch.stack(c).mean(0) for n, c in named.items()})
        ensemble = sum(output({n: c[m] for n, c in named.items()}) for m in range(3)) / 3
        torch.testing.assert_close(model(x), merged, atol=1e-6, rtol=1e-5)
        assert (model(x) - ensemble).abs().max() > 1e-3


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_adamix__starts_as_the_backbone_in_both_modes(make):
    model = make()
    base = logits(model)
    gw.graft(model, gw.AdaMix(consistency=0.0), head=False)
    assert torch.equal(logits(model), base)
    if make is llama:  # no dropout
        model.train()
        assert torch.equal(model(ids()).logits, base)


def test_adamix__stands_behind_the_dense_layer_of_the_feed_forward():
    adapter = gw.graft(bert(), gw.AdaMix(), head=False)
    assert [site.path for site in adapter.sites] == [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]


# -- 2. the draws


def test_adamix__all_pairs_occur():
    model = quiet()
    adapter = grafted(model, copies=2, share="none")
    seen: list[Counter] = [Counter() for _ in adapter.deltas()]
    model.train()
    torch.manual_seed(0)
    for _ in range(60):
        model(ids(1, 2))
        for delta, count in zip(adapter.deltas(), seen, strict=True):
            count[delta.drawn["down"], delta.drawn["up"]] += 1
    assert all(set(count) == {(0, 0), (0, 1), (1, 0), (1, 1)} and min(count.values()) >= 4 for count in seen)
    assert seen[0] != seen[1]  # each layer has its own


def test_adamix__a_training_pass_is_that_of_the_drawn_copies():
    model = quiet()
    adapter = grafted(model, copies=3, share="none")
    plain = quiet()
    one = gw.graft(plain, gw.Bottleneck(d=16, at="down"), head=False)
    model.train()
    torch.manual_seed(3)
    out = model(ids()).logits
    for mixed, delta in zip(adapter.deltas(), one.deltas(), strict=True):
        for name, p in delta.named_parameters():
            p.data = copies(mixed, name)[mixed.drawn["up" if name.startswith("up") else "down"]].detach().clone()
    torch.testing.assert_close(plain(ids()).logits, out)
    with torch.no_grad():
        assert not torch.allclose(model.eval()(ids()).logits, out, atol=1e-4)


@pytest.mark.parametrize("share", ["up", "down", "none"])
def test_adamix__only_the_drawn_copies_learn(share):
    model = quiet()
    adapter = grafted(model, share=share)
    model.train()
    torch.manual_seed(1)
    model(ids(), labels=LABELS).loss.backward()
    for delta in adapter.deltas():
        for name in ("down", "down_bias", "up", "up_bias"):
            side = name.split("_")[0]
            if side == share:
                assert not copies(delta, name) and delta.delta.get_parameter(name).grad.any()
            else:
                learned = [p.grad is not None and bool(p.grad.any()) for p in copies(delta, name)]
                assert learned == [m == delta.drawn[side] for m in range(4)]


def test_adamix__checkpointing_runs_with_the_same_draw():
    results = []
    for checkpointing in (False, True):
        model = bert(layers=3)
        adapter = grafted(model, copies=3, share="none")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        torch.manual_seed(5)
        model(ids(), labels=LABELS).loss.backward()
        results.append({n: p.grad for n, p in adapter.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adamix__checkpointing_tells_two_passes_apart(reentrant):
    """Blocks that run again have the draws of their own pass."""
    results = []
    for checkpointing in (False, True):
        model = bert(layers=3)
        adapter = grafted(model, copies=3, share="none", consistency=2.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model.train()
        torch.manual_seed(5)
        out = model(ids(), labels=LABELS)
        (out.loss + gw.auxiliary_loss(model, out, lambda model=model: model(ids()))).backward()
        results.append({n: p.grad for n, p in adapter.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)


# -- 3. consistency


def test_adamix__one_copy_is_the_plain_adapter():
    outputs, grads = [], []
    for method in (gw.AdaMix(copies=1), gw.Bottleneck(d=16, at="down")):
        model = quiet()
        adapter = gw.graft(model, method, head=False, seed=0)
        spread(adapter)
        model.train()
        out = model(ids(), labels=LABELS)
        extra = gw.auxiliary_loss(model, out, lambda model=model: model(ids()))
        assert extra == 0.0
        (out.loss + extra).backward()
        outputs.append(out.logits)
        grads.append([p.grad for p in adapter.parameters()])
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_adamix__consistency_is_the_symmetric_divergence_of_two_passes():
    model = quiet()
    grafted(model, consistency=0.7, copies=3)
    model.train()
    torch.manual_seed(0)
    first = model(ids(), labels=LABELS)
    second = []
    extra = gw.auxiliary_loss(model, first, lambda: second.append(model(ids())) or second[0])
    p, q = first.logits.softmax(-1), second[0].logits.softmax(-1)
    assert (p - q).abs().max() > 1e-4
    kl = F.kl_div(q.log(), p, reduction="batchmean") + F.kl_div(p.log(), q, reduction="batchmean")
    torch.testing.assert_close(extra, 0.7 * 0.5 * kl)
    assert gw.auxiliary_loss(model, first.logits, lambda: first.logits) == 0.0
    extra.backward()
    drawn = [p.grad for p in gw.adapters(model)["default"].parameters() if p.grad is not None]
    assert drawn and all(grad.any() for grad in drawn)  # the term trains whatever copies the two passes drew


def test_adamix__consistency_leaves_padding_out():
    model = llama()
    grafted(model, consistency=1.0)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    first = model.train()(ids(), attention_mask=mask)
    other = torch.randn(first.logits.shape, generator=torch.Generator().manual_seed(0))
    term = symmetric_kl(first.logits, other)
    torch.testing.assert_close(gw.auxiliary_loss(model, first, lambda: other), term[mask.bool()].mean())


def test_adamix__a_loss_without_a_second_pass_is_refused():
    model = quiet()
    grafted(model, consistency=1.0)
    model.train()(ids())
    with pytest.raises(GraftError, match="compares two passes"):
        gw.auxiliary_loss(model)
    with pytest.raises(GraftError, match="without logits"):
        gw.auxiliary_loss(model, {"a": 1}, lambda: None)


# -- 4. one adapter at the end


def roberta_large():
    config = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    return on_meta(lambda: RobertaForSequenceClassification(config))


@pytest.mark.parametrize(
    ("make", "d", "merged"), [(lambda: bert_of("base"), 48, 894_528), (roberta_large, 16, 811_392)]
)
def test_adamix__parameters_of_the_paper(make, d, merged):
    model = make()
    of = gw.Bottleneck(d=d, at="down")
    width, layers = (768, 12) if d == 48 else (1024, 24)
    trained = layers * (4 * (width * d + d) + d * width + width)
    assert closed_form(model, [of]) == merged == layers * (2 * width * d + d + width)
    assert closed_form(model, [gw.AdaMix(of=of)]) == trained
    assert gw.graft(model, gw.AdaMix(of=of), head=False).num_parameters == trained


@pytest.mark.parametrize("of", [None, gw.LoRA(r=2), gw.Prefix(length=3)])
def test_adamix__the_file_holds_one_plain_adapter(of, tmp_path):
    model = quiet()
    adapter = grafted(model, **({} if of is None else {"of": of}), share="none")
    gw.save(model, "default", tmp_path / "a")
    other = quiet()
    loaded = gw.load(other, tmp_path / "a")
    assert loaded.methods[0].name == ("bottleneck" if of is None else of.name)
    stored = sum(t.numel() for t in load_file(tmp_path / "a" / "adapter.safetensors").values())
    assert stored == loaded.num_parameters == adapter.num_parameters // 4
    assert torch.equal(logits(other), logits(model))


def test_adamix__copies_of_lora_share_b_and_merge():
    model = t5()
    base = model(input_ids=ids(), decoder_input_ids=ids()).logits
    adapter = grafted(model, of=gw.LoRA(r=2, alpha=4.0))
    for delta in adapter.deltas():
        assert len(copies(delta, "down")) == 4 and not copies(delta, "up")
        mean = torch.stack([*copies(delta, "down")]).mean(0)
        torch.testing.assert_close(delta.weight(torch.zeros(32, 32)), 2.0 * delta.delta.up @ mean)
    before = model(input_ids=ids(), decoder_input_ids=ids()).logits
    gw.merge(model)
    torch.testing.assert_close(model(input_ids=ids(), decoder_input_ids=ids()).logits, before, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, base, atol=1e-3)


def test_adamix__rows_of_a_batch_have_their_own():
    model = quiet()
    for name, std in (("a", 0.2), ("b", 0.4)):
        spread(gw.graft(model, gw.AdaMix(consistency=0.0), name, head=False), std)
    apart = []
    for row, name in enumerate("ab"):
        with gw.using(model, name), torch.no_grad():
            apart.append(model(ids()[row : row + 1]).logits)
    with gw.using(model, gw.rows(["a", "b"])), torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, torch.cat(apart), atol=1e-5, rtol=1e-4)


def test_adamix__refusals():
    with pytest.raises(GraftError, match="of its own"):
        gw.AdaMix(of=gw.AdaLoRA())
    with pytest.raises(GraftError, match="copies=0"):
        gw.AdaMix(copies=0)
    with pytest.raises(GraftError, match="share='b'"):
        gw.AdaMix(share="b")
    model = quiet()
    with pytest.raises(GraftError, match="more than the parameters of each site"):
        gw.graft(model, gw.AdaMix(of=gw.Prefix(length=3, reparam="mlp", mid=8)), head=False)
    assert not gw.adapters(model)
