"""Liu et al. 2023: the input of a weight is rotated by a product of butterfly factors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from adapter_models import ids, llama_of, spread
from torch import nn
from weight_models import around, counts, mixtral

import graftwork as gw
from graftwork.methods.weight.boft import permutation

pytestmark = pytest.mark.system("boft")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(d_in=16, d_out=12, **options):
    torch.manual_seed(0)
    model = around(nn.Linear(d_in, d_out))
    adapter = gw.graft(model, gw.BOFT(at="linear", **options), head=False)
    spread(adapter, 0.5)
    (delta,) = adapter.deltas()
    return model, delta, torch.randn(4, d_in)


def rotation(delta):
    """R = F_(m-1) ... F_0, formed from permutation matrices."""
    m, b, d = delta.m, delta.size, delta.d
    out, eye = torch.eye(d), torch.eye(b)
    for i, factor in enumerate(delta.blocks.detach().view(m, d // b, b, b)):
        skew = (factor - factor.mT) / 2
        q = torch.block_diag(*((eye - s) @ torch.linalg.inv(eye + s) for s in skew))
        p = torch.eye(d)[permutation(d, b, i)]
        out = p @ q @ p.T @ out
    return out


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_boft__rotation_is_orthogonal_and_dense_with_all_factors(m):
    model, delta, x = layer(block_size=2, factors=m)
    r = rotation(delta)
    close(r @ r.T, torch.eye(16))
    made = torch.block_diag(*delta.rotation(delta.orthogonal()))
    close(made, r)
    inside = torch.block_diag(*[torch.ones(2 << (m - 1), 2 << (m - 1))] * (8 >> (m - 1))).bool()
    assert torch.equal(r[~inside], torch.zeros_like(r[~inside]))
    assert (r[inside].abs() > 1e-6).all()  # with m = log2(8) + 1 = 4 that is every entry
    assert bool(inside.all()) is (m == 4)
    s = delta.scale
    close(model(x), s * F.linear(x @ r, model.site.weight) + model.site.bias)
    close(delta.weight(model.site.weight), s[:, None] * (model.site.weight @ r.T))


def test_boft__one_factor_is_oft():
    """With s = 1, and q the strict upper part of -S: OFT here turns as its series does, by (I + Q)(I - Q)^-1."""
    model, delta, x = layer(block_size=4)
    delta.scale.data.fill_(1.0)
    other = around(nn.Linear(16, 12))
    other.load_state_dict({n: p for n, p in model.state_dict().items() if "graft" not in n})
    (oft,) = gw.graft(other, gw.OFT(block_size=4, exact=True, at="linear"), head=False).deltas()
    a = delta.blocks.data.view(4, 4, 4)
    above = torch.triu_indices(4, 4, 1)
    oft.q.data = -((a - a.mT) / 2)[:, above[0], above[1]]
    close(model(x), other(x))
    close(delta.weight(model.site.weight), oft.weight(other.site.weight))


def test_boft__permutations():
    assert permutation(8, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert permutation(8, 2, 0).tolist() == list(range(8))
    assert permutation(8, 2, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert permutation(16, 4, 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    for i in range(4):
        assert sorted(permutation(48, 6, i).tolist()) == list(range(48))


def test_boft__two_adapters_with_other_factors_on_one_layer():
    torch.manual_seed(0)
    model, x = around(nn.Linear(16, 12)), torch.randn(4, 16)
    expected = {}
    for name, method in (("a", gw.BOFT(block_size=4, factors=2)), ("b", gw.BOFT(block_size=2, factors=4))):
        adapter = gw.graft(model, dataclasses.replace(method, at="linear"), name, head=False)
        spread(adapter, 0.5)
        (delta,) = adapter.deltas()
        expected[name] = delta.scale * F.linear(x @ rotation(delta), model.site.weight) + model.site.bias
    for name in ("a", "b", "a"):
        with gw.using(model, name):
            close(model(x), expected[name])
    with gw.using(model, "a >> b"):  # the second takes the weight of the first
        merged = model(x)
    first, second = (next(gw.adapters(model)[name].deltas()) for name in "ab")
    close(merged, F.linear(x, second.weight(first.weight(model.site.weight)), model.site.bias))
    assert (expected["a"] - expected["b"]).abs().max() > 0.1


@pytest.mark.parametrize("factors", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_boft__merged_equals_unmerged(kind, factors):
    torch.manual_seed(0)
    site = {"linear": nn.Linear(16, 5), "conv": nn.Conv2d(4, 6, (2, 4)), "embedding": nn.Embedding(11, 16)}[kind]
    model = around(site, nn.Linear(16, 3) if kind == "embedding" else None)
    x = {"linear": torch.randn(2, 16), "conv": torch.randn(2, 4, 8, 8), "embedding": torch.arange(11)}[kind]
    before = model(x)
    adapter = gw.graft(model, gw.BOFT(factors=factors, block_size=2, at="/site/"), head=False)
    assert torch.equal(model(x), before)
    spread(adapter, 0.5)
    (delta,) = adapter.deltas()
    out, r, s = model(x), rotation(delta), delta.scale.detach()
    by_hand = {
        "linear": lambda: s * F.linear(x @ r, site.weight) + site.bias,
        "conv": lambda: F.conv2d(x, (s[:, None] * (site.weight.flatten(1) @ r.T)).view(6, 4, 2, 4), site.bias),
        "embedding": lambda: model.last(s * (site.weight @ r)),
    }[kind]()
    close(out, by_hand)
    gw.merge(model)
    close(model(x), out)


def test_boft__experts():
    model, x = mixtral(), ids()
    spread(gw.graft(model, gw.BOFT(factors=2, at="expert.gate_up, expert.down"), head=False))
    out = model(x).logits
    gw.merge(model)
    close(model(x).logits, out)


def test_boft__block_dropout_is_in_one_factor_only():
    model, delta, _ = layer(block_size=4, factors=1, block_dropout=0.5)
    delta.scale.data.fill_(1.0)
    x, blocks = torch.eye(16), delta.rotation(delta.orthogonal())
    model.train()
    for seed in range(4):
        torch.manual_seed(seed)
        out = model(x) - model.site.bias
        kept = [
            torch.allclose(out[4 * i : 4 * i + 4], blocks[i] @ model.site.weight[:, 4 * i : 4 * i + 4].T)
            for i in range(4)
        ]
        assert sum(kept) == 2
    model, delta, _ = layer(block_size=4, factors=2, block_dropout=0.75)
    q, choices = delta.orthogonal().detach(), []
    for factor in (0, 1):
        for left in range(4):  # three of the four blocks of one factor are left out
            some = q.clone()
            some[factor, [i for i in range(4) if i != left]] = torch.eye(4)
            choices.append(torch.block_diag(*delta.rotation(some)))
    model.train()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        out = (model(x) - model.site.bias) / delta.scale
        hits = [n for n, r in enumerate(choices) if torch.allclose(out, r @ model.site.weight.T, atol=1e-4)]
        assert len(hits) == 1
        seen.add(hits[0])
    assert {n // 4 for n in seen} == {0, 1} and len(seen) > 3


def test_boft__counts():
    """m in b + out per weight: 200 on layers of 20 with outputs of 30 and 10, b = 4."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 10))
    assert gw.graft(model, gw.BOFT(at="/[02]/"), head=False).num_parameters == 200
    big = llama_of(4096, 32, 32, 11008)
    number = 64 * (2 * 4096 * 8 + 4096)
    assert counts(big, gw.BOFT(block_size=8, factors=2)) == (number, number)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"block_size": 5}, "an input of 16"),
        ({"blocks": 3}, "an input of 16"),
        ({"block_size": 4, "factors": 4}, "not divisible"),
        ({"block_size": 1, "factors": 1}, "an input of 16"),
    ],
)
def test_boft__sizes_that_do_not_fit_are_refused(options, found):
    model = around(nn.Linear(16, 12))
    with pytest.raises(gw.GraftError, match=found):
        gw.graft(model, gw.BOFT(at="linear", **options), head=False)
    assert not gw.adapters(model)
