"""Houlsby et al. 2019: bottleneck adapters before the residual add, layer norms trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, bert_of, closed_form, ids, spread

import graftwork as gw

pytestmark = pytest.mark.system("houlsby")


def test_houlsby__order_of_adapter_skip_and_norm():
    model = bert(layers=1)
    x = ids()
    adapter = gw.graft(model, gw.Houlsby(d=4, norms=False), head=False)
    spread(adapter)
    attention, mlp = adapter.parts[0].deltas.values()

    def ad(delta, h):
        thin = F.gelu(F.linear(h, delta.down, delta.down_bias))
        return h + F.linear(thin, delta.up, delta.up_bias)

    with torch.no_grad(), gw.using(model, None):
        layer = model.bert.encoder.layer[0]
        h = model.bert.embeddings(x)
        a = layer.attention.output.dense(layer.attention.self(h)[0])
        u = layer.attention.output.LayerNorm(h + ad(attention, a))
        f = layer.output.dense(layer.intermediate(u))
        expected = layer.output.LayerNorm(u + ad(mlp, f))
        after_norm = ad(mlp, layer.output.LayerNorm(u + f))
        plain = layer.output.LayerNorm(u + f)
    with torch.no_grad():
        out = model.bert(x).last_hidden_state
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, after_norm, atol=1e-2)
    assert not torch.allclose(out, plain, atol=1e-2)


def test_houlsby__zero_up_is_bit_identical_and_default_init_is_near():
    model = bert()
    x = ids()
    with torch.no_grad():
        base = model(x).logits
        gw.graft(model, gw.Houlsby(init="zero_up"), "exact", head=False)
        assert torch.equal(model(x).logits, base)
        gw.graft(model, gw.Houlsby(), "near", head=False, seed=0)
        moved = (model(x).logits - base).pow(2).mean().sqrt() / base.pow(2).mean().sqrt()
    assert 0 < moved < 1e-3


@pytest.mark.parametrize(
    "size, adapters, norms, per_layer", [("base", 2_379_264, 38_400, None), ("large", 6_343_680, 100_352, 264_320)]
)
def test_houlsby__parameter_oracles(size, adapters, norms, per_layer):
    model = bert_of(size)
    methods = gw.Houlsby(d=64)
    assert closed_form(model, methods[:1]) == adapters
    assert closed_form(model, methods[1:]) == norms
    adapter = gw.graft(model, methods, head=False)
    assert adapter.num_parameters == adapters + norms
    if per_layer:
        of_layer = [
            d for key, d in adapter.parts[0].deltas.items() if ".layer.3." in key or key.endswith(".layer.3:mlp")
        ]
        assert sum(p.numel() for d in of_layer for p in d.parameters()) == per_layer


def test_houlsby__trained_are_exactly_adapters_norms_and_head():
    model = bert()
    norms = {name for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    adapter = gw.graft(model, gw.Houlsby(d=4))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter.parameters()}
    adapters, full, head = adapter.parts
    assert {s.path for s in full.sites} == norms and len(norms) == 5
    assert [s.path for s in head.sites] == ["classifier"]
    assert len(adapters.sites) == 4
    loss = model(ids(), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert model.bert.pooler.dense.weight.grad is None and model.bert.embeddings.word_embeddings.weight.grad is None


def test_houlsby__initial_weights_are_truncated():
    adapter = gw.graft(bert(), gw.Houlsby(d=16, norms=False), head=False)
    for delta in adapter.deltas():
        for weight in (delta.down, delta.up):
            assert weight.abs().max() <= 2e-3
            assert 0.5e-3 < weight.std() < 1.2e-3
        assert not delta.down_bias.any() and not delta.up_bias.any()


def test_houlsby__linear_adapter_merges():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x = torch.randn(4, 6)
    base = model[0]
    adapter = gw.graft(model, gw.Bottleneck(d=2, act="none", init="houlsby", at="/^0$/"), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    with torch.no_grad():
        both = delta.up @ delta.down
        weight = base.weight + both @ base.weight
        bias = base.bias + both @ base.bias + delta.up @ delta.down_bias + delta.up_bias
        torch.testing.assert_close(model(x), model[2](torch.tanh(F.linear(x, weight, bias))), atol=1e-5, rtol=1e-5)
