"""Ben Zaken et al. 2021: only the biases are trained."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, bert_of, closed_form, ids, llama, spread
from torch import nn
from weight_models import Attention, around, counts, gpt2

import graftwork as gw

pytestmark = pytest.mark.system("bitfit")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_bitfit__counts():
    base, large = bert_of("base"), bert_of("large")
    assert counts(base, gw.BitFit()) == (102_144, 102_144)
    assert counts(base, gw.BitFit(at="any, pooler")) == (102_912, 102_912)
    assert counts(base, gw.BitFit(at="q, up")) == (46_080, 46_080)
    assert counts(large, gw.BitFit()) == (271_360, 271_360)
    assert counts(large, gw.BitFit(at="any, pooler")) == (272_384, 272_384)
    share = 102_144 / sum(p.numel() for n, p in base.named_parameters() if "classifier" not in n)
    assert 100 * share == pytest.approx(0.09, abs=0.005)


def test_bitfit__training_changes_biases_only():
    """After some steps and a merge, what differs from the backbone is every parameter that ends in .bias."""
    model, x = bert(), ids()
    kept = {n: p.clone() for n, p in model.state_dict().items()}
    adapter = gw.graft(model, gw.BitFit(), head=False)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(x).logits.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    out = model(x).logits
    gw.merge(model)
    gw.forget(model)
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, kept[n])}
    biases = {n for n in kept if n.endswith(".bias") and "classifier" not in n and "pooler" not in n}
    # a key's bias shifts all scores of a query alike: softmax does not see it, and its gradient is rounding
    assert biases - {n for n in biases if ".key." in n} <= changed <= biases
    close(model(x).logits, out)


def test_bitfit__terms_match_by_role():
    model = bert()
    adapter = gw.graft(model, gw.BitFit(at="q, up"), head=False)
    paths = {site.path for site in adapter.sites}
    assert paths == {
        f"bert.encoder.layer.{i}.{leaf}" for i in range(2) for leaf in ("attention.self.query", "intermediate.dense")
    }
    assert adapter.num_parameters == 2 * (32 + 64)
    assert closed_form(bert_of("base"), [gw.BitFit(at="q, up")]) == 12 * 3840


def test_bitfit__rows_of_a_batch_with_biases_of_their_own():
    """Many tenants in one batch: a bias difference per row equals each row's own forward."""
    torch.manual_seed(0)
    model, x = bert(), ids(batch=3)
    rows = [gw.graft(model, gw.BitFit(at="linear"), name, head=False) for name in "abc"]
    for i, adapter in enumerate(rows):
        torch.manual_seed(i)
        for p in adapter.parameters():
            p.data.normal_()
    alone = []
    for i, name in enumerate("abc"):
        gw.activate(model, name)
        alone.append(model(x[i : i + 1]).logits)
    gw.activate(model, "a")
    names = [n for n, _ in rows[0].named_parameters()]
    values = [dict(adapter.named_parameters()) for adapter in rows]
    stacked = {id(values[0][n]): torch.stack([v[n] for v in values])[:, None] for n in names}  # [rows, 1, d]
    given = {n: stacked[id(p)] for n, p in model.named_parameters() if id(p) in stacked}
    assert len(given) == len(names)
    with torch.no_grad():
        together = torch.func.functional_call(model, given, (x,)).logits
    close(together, torch.cat(alone))
    assert (together[1] - alone[0]).abs().max() > 1e-3


@pytest.mark.parametrize("make", [bert, gpt2])
def test_bitfit__identity_and_merge(make):
    model, x = make(), ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.BitFit(), head=False)
    assert torch.equal(model(x).logits, before)
    spread(adapter)
    with torch.no_grad():
        out = model(x).logits
        assert (out - before).abs().max() > 1e-2
        gw.merge(model)
        close(model(x).logits, out)


def test_bitfit__a_model_without_biases():
    model, x = llama(), ids()
    with pytest.raises(gw.GraftError, match="add_missing=True"):
        gw.graft(model, gw.BitFit(at="linear"), head=False)
    assert not gw.adapters(model)
    before = model(x).logits
    adapter = gw.graft(model, gw.BitFit(at="q, down", add_missing=True), head=False)
    assert adapter.num_parameters == 2 * (32 + 32)
    assert torch.equal(model(x).logits, before)
    spread(adapter)
    out = model(x).logits
    assert (out - before).abs().max() > 1e-2
    gw.merge(model)
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    close(model(x).logits, out)
    gw.unmerge(model)
    gw.remove(model, "default")
    assert model.model.layers[0].self_attn.q_proj.bias is None
    assert torch.equal(model(x).logits, before)


def test_bitfit__packed_attention_and_convolutions():
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 5, 12)
    adapter = gw.graft(model, gw.BitFit(at="any"), head=False)
    assert adapter.num_parameters == 3 * 12 + 12
    spread(adapter)
    out = model(x)
    gw.merge(model)
    close(model(x), out)
    part = gw.graft(half := Attention().eval(), gw.BitFit(at="v"), head=False)
    assert part.num_parameters == 12
    spread(part)
    kept = half.attn.in_proj_bias.clone()
    gw.merge(half)
    assert torch.equal(half.attn.in_proj_bias[:24], kept[:24])
    assert not torch.equal(half.attn.in_proj_bias[24:], kept[24:])
    conv = around(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 6, 6)
    before = conv(x)
    (delta,) = gw.graft(conv, gw.BitFit(at="conv"), head=False).deltas()
    nn.init.normal_(delta.shift["bias"])
    close(conv(x), before + delta.shift["bias"][:, None, None])


def test_bitfit__differences_of_two_adapters_add_up():
    model, x = bert(), ids()
    both = bert()
    for name in "ab":
        torch.manual_seed(ord(name))
        adapter = gw.graft(model, gw.BitFit(), name, head=False)
        for p in adapter.parameters():
            p.data.normal_(std=0.2)
        for site, delta in zip(adapter.sites, adapter.deltas(), strict=True):
            both.get_submodule(site.path).bias.data += delta.shift["bias"]
    gw.activate(model, "a >> b")
    close(model(x).logits, both(x).logits)
