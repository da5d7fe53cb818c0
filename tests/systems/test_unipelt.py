"""Mao et al. 2021: adapters, prefixes and LoRA that each example switches on or off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, bert_of, closed_form, ids, llama, masked_bert, spread

import graftwork as gw
from graftwork.combinators.gate import Gate

pytestmark = pytest.mark.system("unipelt")


def gates(adapter) -> list[Gate]:
    return [m for d in adapter.deltas() for m in d.modules() if isinstance(m, Gate)]


def force(adapter, c: float) -> None:
    """Every gate constant: zero weights, and a bias whose sigmoid is c."""
    for gate in gates(adapter):
        gate.weight.data.zero_()
        gate.bias.data.fill_({0.0: -1e4, 1.0: 1e4}.get(c, float(torch.logit(torch.tensor(c)))))


def logits(model, mask=None, tokens=None):
    with torch.no_grad():
        return model(ids() if tokens is None else tokens, attention_mask=mask).logits


def seen(model, adapter, **inputs) -> dict[str, torch.Tensor]:
    """g [batch] of every gate in a pass, by site."""
    found, hooks = {}, []
    for key, delta in ((k, d) for part in adapter.parts for k, d in part.deltas.items()):
        gate = next(m for m in delta.modules() if isinstance(m, Gate))
        hooks.append(gate.register_forward_hook(lambda m, a, out, key=key: found.__setitem__(key, out.flatten())))
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


# -- 1. closed gates


def test_unipelt__closed_gates_leave_the_backbone_and_keys_of_zero():
    model = masked_bert()
    base = logits(model)
    without = gw.graft(model, gw.UniPELT("al"), "without", head=False)
    spread(without)
    assert not torch.allclose(logits(model), base, atol=1e-3)
    force(without, 0.0)
    assert torch.equal(logits(model), base)
    whole = gw.graft(model, gw.UniPELT(length=4, mid=8), "whole", head=False)
    spread(whole)
    force(whole, 0.0)
    closed = logits(model)
    zeros = gw.graft(model, gw.Prefix(length=4), "zeros", head=False)
    for p in zeros.parameters():
        p.data.zero_()
    torch.testing.assert_close(closed, logits(model), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(closed, base, atol=1e-4)


def test_unipelt__zero_keys_by_hand():
    """softmax over [0 ... 0, q k^T s] and values [0 ... 0, V]: the backbone's attention times the mass that is left to its keys."""
    model = masked_bert(layers=1)
    attention = model.bert.encoder.layer[0].attention
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    own = attention.self
    with torch.no_grad():
        q, k, v = (m(x).view(2, 5, 4, 8).transpose(1, 2) for m in (own.query, own.key, own.value))
        scores = F.pad(q @ k.transpose(-1, -2) * 8**-0.5, (3, 0))
        out = scores.softmax(-1)[..., 3:] @ v
        by_hand = attention.output(out.transpose(1, 2).reshape(2, 5, 32), x)
        adapter = gw.graft(model, gw.Gated(of=gw.Prefix(length=3)), head=False)
        force(adapter, 0.0)
        seen_there = {}
        hook = attention.output.register_forward_hook(lambda m, a, out: seen_there.__setitem__("out", out))
        model.bert.encoder(x)
        hook.remove()
    torch.testing.assert_close(seen_there["out"], by_hand, atol=1e-6, rtol=1e-5)


# -- 2. one gate per example


def test_unipelt__a_gate_is_the_mean_of_a_sigmoid_per_example():
    model = masked_bert()
    adapter = gw.graft(model, gw.UniPELT(length=3, mid=8), head=False)
    spread(adapter)
    found = seen(model, adapter, input_ids=ids(batch=3))
    assert len(found) == len(gates(adapter)) == 8
    for g in found.values():
        assert g.shape == (3,) and len(set(g.tolist())) == 3
        assert ((g > 0) & (g < 1)).all()
    gate, x = gates(adapter)[0], torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
    runtime = next(adapter.deltas()).runtime
    with torch.no_grad():
        g = gate(x, runtime)
        assert g.shape == (2, 1, 1)
        torch.testing.assert_close(g.flatten(), torch.sigmoid(x @ gate.weight[0] + gate.bias).mean(1))
        torch.testing.assert_close(gate(x[:, torch.randperm(6)], runtime), g)


@pytest.mark.parametrize("tokens", ["all", "real"])
def test_unipelt__padding_counts_or_is_left_out(tokens):
    model = masked_bert(layers=1)
    method = gw.Gated(of=gw.LoRA(r=2, at="q, v"), tokens=tokens)
    adapter = gw.graft(model, method, head=False)
    spread(adapter)
    short = ids(batch=1, seq=4)
    long = torch.cat([short, ids(batch=1, seq=3, seed=9)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    alone = seen(model, adapter, input_ids=short)
    padded = seen(model, adapter, input_ids=long, attention_mask=mask)
    for key, g in padded.items():
        assert torch.allclose(g, alone[key], atol=1e-6) == (tokens == "real"), key
    if tokens == "real":
        with torch.no_grad():
            together = model(input_ids=long, attention_mask=mask).logits[:, :4]
            torch.testing.assert_close(together, model(input_ids=short).logits, atol=1e-5, rtol=1e-5)


# -- 3. constant gates


@pytest.mark.parametrize("c", [0.25, 0.5, 1.0])
def test_unipelt__constant_gates_are_a_scaled_adapter_and_an_alpha(c):
    gated, plain = masked_bert(), masked_bert()
    adapter = {"position": "sum", "at": "mlp.norm", "act": "relu"}
    one = gw.graft(gated, gw.UniPELT("al"), head=False)
    spread(one)
    force(one, c)
    other = gw.graft(plain, [gw.Bottleneck(reduction=16, scale=c, **adapter), gw.LoRA(r=8, alpha=8 * c)], head=False)
    values = [v for k, v in one.state_dict().items() if "gate." not in k]
    for p, v in zip(other.state_dict().values(), values, strict=True):
        p.copy_(v)
    torch.testing.assert_close(logits(gated), logits(plain), atol=1e-5, rtol=1e-5)


def test_unipelt__an_open_gate_is_a_plain_prefix():
    gated, plain = llama(), llama()
    one = gw.graft(gated, gw.Gated(of=gw.Prefix(length=3)), head=False)
    spread(one)
    force(one, 1.0)
    other = gw.graft(plain, gw.Prefix(length=3), head=False)
    values = [v for k, v in one.state_dict().items() if "gate." not in k]
    for p, v in zip(other.state_dict().values(), values, strict=True):
        p.copy_(v)
    torch.testing.assert_close(logits(gated), logits(plain))


def test_unipelt__the_adapters_gate_reads_what_the_adapter_reads():
    """z + g U relu(D LN(z) + b) + b' with g = mean_t sigmoid(w LN(z)_t + b_g)."""
    model = masked_bert(layers=1)
    adapter = gw.graft(model, gw.UniPELT("a", reduction=4), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        with gw.using(model, None):
            x = layer.attention(model.bert.embeddings(ids()))[0]
            z, norm = layer.output.dense(layer.intermediate(x)) + x, layer.output.LayerNorm
            h = norm(z)
            g = torch.sigmoid(h @ delta.gate.weight[0] + delta.gate.bias).mean(1)[:, None, None]
            up = F.linear(F.relu(F.linear(h, delta.down, delta.down_bias)), delta.up, delta.up_bias)
            by_hand = model.cls(norm(z + g * up))
        torch.testing.assert_close(logits(model), by_hand, atol=1e-5, rtol=1e-5)


# -- 4. counts, merging, files


def test_unipelt__parameter_oracle_and_no_merging():
    model = bert_of("base")
    methods = gw.UniPELT()
    adapter = gw.graft(model, methods, head=False)
    assert adapter.num_parameters == closed_form(model, methods)
    assert sum(p.numel() for g in gates(adapter) for p in g.parameters()) == 12 * 4 * 769 == 36_912
    folded = [gw.UniPELT("a"), gw.UniPELT("l"), [gw.Gated(of=gw.Prefix(length=10))]]
    per_layer = [2 * 768 * 48 + 48 + 768 + 769, 4 * 768 * 8 + 2 * 769, 2 * 10 * 768 + 769]
    assert [closed_form(model, m) for m in folded] == [12 * n for n in per_layer]
    small = bert()
    gw.graft(small, gw.UniPELT("l"), head=False)
    with pytest.raises(gw.GraftError, match="gated"):
        gw.merge(small)
    assert [m.name for m in gw.UniPELT("aplb")] == ["gated", "gated", "gated", "bitfit"]
    for wrong in ("", "ax", "aa"):
        with pytest.raises(gw.GraftError, match="not some of"):
            gw.UniPELT(wrong)


def test_unipelt__the_file_holds_plain_prefixes_and_gates(tmp_path):
    model = masked_bert()
    adapter = gw.graft(model, gw.UniPELT(length=3, mid=8), head=False)
    spread(adapter)
    out = logits(model)
    gw.save(model, "default", tmp_path / "a")
    twin = masked_bert()
    loaded = gw.load(twin, tmp_path / "a")
    assert [m.of.name for m in loaded.methods] == ["bottleneck", "prefix", "lora"]
    assert loaded.methods[1].of.reparam == "flat"
    torch.testing.assert_close(logits(twin), out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("make", [bert, llama])
def test_unipelt__rows_are_what_each_is_alone(make):
    model, tokens = make(), ids(batch=4)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7, [1] * 4 + [0] * 3])
    at = {"at": "mlp.norm"} if make is bert else {"at": "mlp"}
    for name, kind in (("x", "all"), ("y", "real")):
        methods = [gw.Gated(of=m.of, tokens=kind) for m in gw.UniPELT(length=3, mid=8, **at)]
        spread(gw.graft(model, methods, name, head=False), 0.2 if name == "x" else 0.3)
    gw.activate(model, "rows(x, y, none, x)")
    together = logits(model, mask, tokens)
    for i, name in enumerate(("x", "y", None, "x")):
        with gw.using(model, name):
            torch.testing.assert_close(
                together[i : i + 1], logits(model, mask[i : i + 1], tokens[i : i + 1]), atol=1e-5, rtol=1e-4
            )


def test_unipelt__what_cannot_be_gated_is_refused():
    model = bert()
    for method, found in (
        (gw.Gated(of=gw.LoReFT(r=2)), "no place for a gate"),
        (gw.Gated(of=gw.LNTuning()), "not applied token by token"),
    ):
        with pytest.raises(gw.GraftError, match=found):
            gw.graft(model, method)
    with pytest.raises(gw.GraftError, match="of its own"):
        gw.Gated(of=gw.AdaLoRA())
    assert gw.adapters(model) == {}
