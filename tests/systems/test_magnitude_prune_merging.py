"""Magnitude-prune merging: the weighted sum of changes of which only the largest entries stay."""

from __future__ import annotations

import pytest
import torch
from test_ties_merging import two
from value_models import by_formula, change, keys, relative
from weight_models import dense

import graftwork as gw
from graftwork.values.rules import keep_largest

prune = pytest.mark.system("magnitude-prune-merging")


@prune
def test_magnitude_prune_merging__density_one_is_the_sum_and_less_loses_the_dropped():
    model = two()
    weights = {"a": 0.7, "b": -1.2}
    gw.combine(model, "all", weights, "magnitude_prune", density=1.0, r=32)
    gw.combine(model, "one", {"a": 1.0}, "magnitude_prune", density=0.3, r=32)
    for key in keys(model, "a"):
        assert (
            relative(change(model, "all", key), sum(w * by_formula(model, n, key) for n, w in weights.items())) < 1e-5
        )
        t = by_formula(model, "a", key)
        k = round(0.3 * t.numel())
        dropped = t.abs().flatten().sort(descending=True).values[k:]
        error = (change(model, "one", key) - t).square().sum()
        assert float(error) == pytest.approx(float(dropped.square().sum()), rel=1e-4)


@prune
def test_magnitude_prune_merging__peft_numbers():
    peft = pytest.importorskip("peft.utils.merge_utils")
    g = torch.Generator().manual_seed(0)
    ts = [torch.randn(20, 10, generator=g, dtype=torch.float64) for _ in range(3)]
    weights = [0.5, -2.0, 1.0]
    mine = sum(w * keep_largest([t], 0.25)[0] for w, t in zip(weights, ts, strict=True))
    peer = peft.magnitude_prune(ts, torch.tensor(weights, dtype=torch.float64), 0.25)
    torch.testing.assert_close(mine, peer)


@prune
def test_magnitude_prune_merging__one_threshold_for_the_whole_adapter():
    g = torch.Generator().manual_seed(0)
    small, large = torch.randn(7, 9, generator=g), 3 * torch.randn(11, 4, generator=g)
    kept = keep_largest([small, large], 0.37)
    assert sum(int((t != 0).sum()) for t in kept) == round(0.37 * (63 + 44))
    smallest = min(float(t[t != 0].abs().min()) for t in kept)
    largest = max(float(t[k == 0].abs().max()) for t, k in zip((small, large), kept, strict=True))
    assert smallest > largest
    # equal magnitudes: by position, and exactly as many
    signs = torch.tensor([1.0, -1.0] * 5)
    first, then = keep_largest([signs, signs], 0.7)
    assert torch.equal(first, signs)
    assert torch.equal(then, torch.cat([signs[:4], torch.zeros(6)]))
    # the adapter
    model = two()
    gw.combine(model, "new", {"a": 1.0, "b": -2.0}, "magnitude_prune", density=0.2, scope="adapter", r=32)
    sites = keys(model, "a")
    parts = {n: keep_largest([by_formula(model, n, key) for key in sites], 0.2) for n in "ab"}
    for i, key in enumerate(sites):
        assert relative(change(model, "new", key), parts["a"][i] - 2 * parts["b"][i]) < 1e-4
    gw.combine(model, "each", {"a": 1.0, "b": -2.0}, "magnitude_prune", density=0.2, scope="site", r=32)
    assert any(relative(change(model, "each", key), change(model, "new", key)) > 0.01 for key in sites)


@prune
def test_magnitude_prune_merging__merged_equals_the_sparse_sum_added_to_the_weight():
    model = two()
    made = gw.combine(model, "new", {"a": 0.7, "b": -1.2}, "magnitude_prune", density=0.1, r=32)
    assert made.error < 1e-6
    weights = {key: dense(model, key).detach().clone() for key in keys(model, "a")}
    gw.merge(model)
    for key, before in weights.items():
        ts = (w * keep_largest([by_formula(model, n, key)], 0.1)[0] for n, w in (("a", 0.7), ("b", -1.2)))
        sparse = sum(ts).float().to_sparse()
        assert sparse._nnz() <= 2 * round(0.1 * before.numel())
        torch.testing.assert_close(dense(model, key), before + sparse, atol=1e-6, rtol=1e-5)
