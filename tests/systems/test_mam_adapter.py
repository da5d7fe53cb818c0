"""He et al. 2021: the unified view, scaled parallel adapters, and the mix-and-match adapter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bart_large, bert, closed_form, ids, llama, spread, t5

import graftwork as gw

pytestmark = pytest.mark.system("mam-adapter")


def hidden(model):
    """The last hidden states, of unit scale."""
    with torch.no_grad():
        return model(ids(), output_hidden_states=True).hidden_states[-1]


def test_mam_adapter__prefix_attention_is_the_gated_form():
    model = bert()
    adapter = gw.graft(model, gw.Prefix(length=3), head=False)
    spread(adapter, 1.0)
    delta = next(adapter.deltas())
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=generator) for _ in range(3))
    with torch.no_grad():
        out = delta.attend(q, k, v, None, lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v))
        keys, values = delta.in_front(delta.keys, k), delta.in_front(delta.values, v)
        prefix, own = q @ keys.mT / 8**0.5, q @ k.mT / 8**0.5  # both logit sets
        gate = torch.sigmoid(prefix.logsumexp(-1, keepdim=True) - own.logsumexp(-1, keepdim=True))
        expected = (1 - gate) * (own.softmax(-1) @ v) + gate * (prefix.softmax(-1) @ values)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert 0.05 < gate.mean() < 0.95


def test_mam_adapter__linear_parallel_adapter_is_lora():
    outputs = []
    for method in (
        gw.Bottleneck(d=3, act="none", bias=False, position="parallel", scale=12 / 3, at="q, v, down"),
        gw.LoRA(r=3, alpha=12, at="q, v, down"),
    ):
        model = bert()
        adapter = gw.graft(model, method, head=False)
        for i, delta in enumerate(adapter.deltas()):
            for name, p in delta.named_parameters():
                p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + len(name)))
        outputs.append(hidden(model))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    with gw.using(model, None):
        assert not torch.allclose(hidden(model), outputs[0], atol=1e-2)


@pytest.mark.parametrize("make", [bert, llama])
def test_mam_adapter__parallel_reads_what_the_feed_forward_reads(make):
    model = make(layers=1)
    adapter = gw.graft(model, gw.Parallel(d=4), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    first = "bert.encoder.layer.0.intermediate.dense" if make is bert else "model.layers.0.mlp.gate_proj"
    last = "bert.encoder.layer.0.output.dropout" if make is bert else "model.layers.0.mlp.down_proj"
    seen = {}
    for name, path in (("entry", first), ("exit", last)):
        model.get_submodule(path).register_forward_hook(
            lambda m, a, out, name=name: seen.__setitem__(name, (a[0], out))
        )
    hidden(model)
    x, y = seen["entry"][0], seen["exit"][1]
    with gw.using(model, None):
        hidden(model)
    plain = seen["exit"][1]
    with torch.no_grad():
        relu = torch.relu(F.linear(x, delta.down, delta.down_bias))
        torch.testing.assert_close(y, plain + 4 * F.linear(relu, delta.up, delta.up_bias), atol=1e-4, rtol=1e-4)


def test_mam_adapter__init_sequential_and_scale():
    model = bert()
    base = hidden(model)
    gw.graft(model, gw.Parallel(d=4), "pa", head=False)
    assert torch.equal(hidden(model), base)

    def filled(**hyper):
        model = bert()
        adapter = gw.graft(model, gw.Bottleneck(d=4, act="relu", at="mlp", **hyper), head=False)
        for delta in adapter.deltas():
            for name, p in delta.named_parameters():
                p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
        return model, adapter

    parallel, _ = filled(position="parallel", scale=4.0)
    sequential, _ = filled(position="after", scale=4.0)
    assert not torch.allclose(hidden(parallel), hidden(sequential), atol=1e-2)
    twice, _ = filled(position="parallel", scale=8.0)
    doubled, adapter = filled(position="parallel", scale=4.0)
    for delta in adapter.deltas():
        delta.up.data *= 2
        delta.up_bias.data *= 2
    torch.testing.assert_close(hidden(twice), hidden(doubled), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(hidden(twice), hidden(parallel), atol=1e-2)
    learned = gw.graft(bert(), gw.Parallel(d=4, learned=True, scale=1.0), head=False)
    assert all(delta.scale.shape == (1,) and delta.scale == 1 for delta in learned.deltas())


def test_mam_adapter__count_oracle_on_bart_large():
    model = bart_large()
    stored = gw.MAM(length=30, d=512, reparam="flat")
    assert closed_form(model, stored) == 27_414_528
    adapter = gw.graft(model, stored, head=False)
    assert adapter.num_parameters == 27_414_528
    kinds = [(site.tower, site.cross) for site in adapter.parts[0].sites]
    assert [kinds.count(k) for k in (("encoder", False), ("decoder", False), ("decoder", True))] == [12, 12, 12]
    backbone = sum(p.numel() for p in bart_large().parameters())
    assert round(100 * 27_414_528 / backbone, 1) in (6.7, 6.8)
    trained = gw.MAM(length=30, d=512)
    assert closed_form(model, trained) == gw.graft(model, trained, "mlp", head=False).num_parameters


def test_mam_adapter__preset_is_prefix_and_parallel_together(tmp_path):
    model = t5()

    def out(model):
        with torch.no_grad():
            return model(input_ids=ids(), decoder_input_ids=ids(seed=5)).logits

    whole = gw.graft(model, gw.MAM(length=3, d=5, mid=7), "mam", head=False)
    spread(whole)
    expected = out(model)
    for part, methods, name in ((0, gw.Prefix(3, "mlp", 7), "prefix"), (1, gw.Parallel(d=5), "pa")):
        alone = gw.graft(model, methods, name, head=False).parts[0]
        alone.shared_modules.load_state_dict(whole.parts[part].shared_modules.state_dict())
        for key, delta in alone.deltas.items():
            delta.load_state_dict(whole.parts[part].deltas[key].state_dict())
    gw.activate(model, "prefix >> pa")
    torch.testing.assert_close(out(model), expected, atol=1e-5, rtol=1e-5)
    gw.activate(model, "pa")
    assert not torch.allclose(out(model), expected, atol=1e-3)
    gw.save(model, "mam", tmp_path / "mam")  # the prefix without its MLP
    other = t5()
    assert "mlp" not in str(gw.load(other, tmp_path / "mam").methods[0])
    torch.testing.assert_close(out(other), expected, atol=1e-5, rtol=1e-5)
