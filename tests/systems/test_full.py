"""Whole modules trained (heads, norms), and LN tuning: the norms' gains and biases as differences."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids, llama, spread
from torch import nn
from weight_models import counts, gpt2, roberta_of

import graftwork as gw

ln_tuning = pytest.mark.system("ln-tuning")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@ln_tuning
@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_ln_tuning__only_norms_are_trained(make):
    model = make()
    adapter = gw.graft(model, gw.LNTuning(), head=False)
    norms = {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    assert {site.path for site in adapter.sites} == norms
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.split(".graft.")[0] in norms for n in trained)
    assert adapter.num_parameters == sum(p.numel() for n in norms for p in model.get_submodule(n)._parameters.values())
    for at in ("linear", "q", "/embed|wte/"):
        with pytest.raises(gw.GraftError, match="not a normalisation layer"):
            gw.graft(make(), gw.LNTuning(at=at), head=False)


@ln_tuning
@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_ln_tuning__identity_and_merge_to_the_bit(make):
    model, x = make(), ids()
    kept = {n: p.clone() for n, p in model.state_dict().items()}
    before = model(x).logits
    adapter = gw.graft(model, gw.LNTuning(), head=False)
    assert torch.equal(model(x).logits, before)
    spread(adapter)
    out = model(x).logits
    assert (out - before).abs().max() > 1e-2
    gw.merge(model)
    assert torch.equal(model(x).logits, out)
    gw.unmerge(model)
    assert all(torch.equal(p, kept[n]) for n, p in model.state_dict().items() if n in kept)
    gw.remove(model, "default")
    assert torch.equal(model(x).logits, before)


@ln_tuning
def test_ln_tuning__differences_of_two_adapters_add_up():
    model, x, both = bert(), ids(), bert()
    for name in "ab":
        torch.manual_seed(ord(name))
        adapter = gw.graft(model, gw.LNTuning(), name, head=False)
        for p in adapter.parameters():
            p.data.normal_(std=0.2)
        for site, delta in zip(adapter.sites, adapter.deltas(), strict=True):
            norm = both.get_submodule(site.path)
            norm.weight.data += delta.shift["weight"]
            norm.bias.data += delta.shift["bias"]
    for order in ("a >> b", "b >> a"):
        gw.activate(model, order)
        close(model(x).logits, both(x).logits)


@ln_tuning
def test_ln_tuning__counts():
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    assert counts(model, gw.LNTuning()) == (32, 32)
    # 12 layers of two norms, and the embeddings' own
    assert counts(roberta_of("base"), gw.LNTuning()) == (25 * 2 * 768, 25 * 2 * 768)


@ln_tuning
@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.GroupNorm])
def test_ln_tuning__other_norms(cls):
    """The running statistics of a BatchNorm stay out of the adapter."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8) if cls is nn.BatchNorm1d else nn.GroupNorm(2, 8)
    model, x = nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 3)).eval(), torch.randn(5, 4)
    adapter = gw.graft(model, gw.LNTuning(), head=False)
    assert sorted(adapter.state_dict()) == ["0/1:norm/shift.bias", "0/1:norm/shift.weight"]
    spread(adapter)
    out = model(x)
    (delta,) = adapter.deltas()
    with torch.no_grad():
        norm._parameters["weight"] += delta.shift["weight"]
        norm._parameters["bias"] += delta.shift["bias"]
    gw.activate(model, None)
    close(model(x), out)


def test_full__norms_stand_in_for_the_backbones():
    """Full stores values, not differences: the last of two active adapters decides."""
    model, x = bert(), ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.Full(at="norm"), "a", head=False)
    assert torch.equal(model(x).logits, before)
    spread(adapter)
    out = model(x).logits
    gw.merge(model)
    assert torch.equal(model(x).logits, out)
    gw.unmerge(model)
    gw.graft(model, gw.Full(at="norm"), "b", head=False)
    gw.activate(model, "a >> b")
    assert torch.equal(model(x).logits, before)
    gw.activate(model, "b >> a")
    assert torch.equal(model(x).logits, out)


def test_full__a_head_of_another_size(tmp_path):
    model, x = bert(), ids()
    base = model.classifier
    gw.graft(model, gw.Full(at="head", outputs=5), "five")
    assert model(x).logits.shape == (2, 5)
    assert base.weight.shape[0] == 2
    spread(gw.adapters(model)["five"])
    out = model(x).logits
    gw.save(model, "five", tmp_path / "five")
    again = bert()
    gw.load(again, tmp_path / "five")
    assert torch.equal(again(x).logits, out)
    gw.activate(model, None)
    assert model(x).logits.shape == (2, 2)


def test_full__counts():
    model = roberta_of("base")
    head = sum(p.numel() for p in model.classifier.parameters())
    assert counts(model, gw.Full()) == (head, head)
