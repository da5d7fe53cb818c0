"""Yadav et al. 2023: trim, elect the sign, merge what agrees."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert
from value_models import by_formula, change, keys, randomly, relative

import graftwork as gw
from graftwork.values.rules import elect, keep_largest

ties = pytest.mark.system("ties-merging")


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def merged(ts, weights, density=1.0, majority="total"):
    return elect([keep_largest([t], density)[0] for t in ts], weights, majority)


def two(model=None):
    model = bert() if model is None else model
    randomly(model, gw.LoRA(r=2, alpha=3.0, at="q, up"), "a", 1)
    randomly(model, gw.LoRA(r=3, alpha=1.0, at="q, up"), "b", 2)
    return model


@ties
def test_ties_merging__one_adapter_and_equal_ones():
    t = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(merged([t], [1.0]), t)
    torch.testing.assert_close(merged([t, t, t], [1.0] * 3), t)
    model = two()
    made = gw.combine(model, "new", {"a": 1.0}, "ties", density=1.0)
    assert made.error < 1e-6
    for key in keys(model, "a"):
        assert relative(change(model, "new", key), by_formula(model, "a", key)) < 1e-5
    gw.scale(model, "twin", "a", 1.0)
    gw.combine(model, "same", {"a": 1.0, "twin": 1.0}, "ties", density=1.0)
    for key in keys(model, "a"):
        assert relative(change(model, "same", key), by_formula(model, "a", key)) < 1e-5


@ties
def test_ties_merging__by_hand():
    a, b = tensors([1, -3, 2], [2, 1, -1])
    assert merged([a, b], [1.0, 1.0]).tolist() == [1.5, -3, 2]
    # the trim: of ten entries three stay, by magnitude; round, not cut off
    (t,) = tensors([5, -1, 4, 2, -9, 0.5, 3, 8, 7, 6])
    assert keep_largest([t], 0.3)[0].tolist() == [0, 0, 0, 0, -9, 0, 0, 8, 7, 0]
    (long,) = tensors([float(i) for i in range(1, 101)])
    assert int((keep_largest([long], 0.29)[0] != 0).sum()) == 29  # 0.29 * 100 is 28.999...
    # frequency: two small votes beat a large one
    a, b, c = tensors([-9], [1], [2])
    assert merged([a, b, c], [1.0] * 3, majority="frequency").tolist() == [1.5]
    assert merged([a, b, c], [1.0] * 3).tolist() == [-9]
    # a tied vote counts as +
    a, b = tensors([2], [-2])
    assert merged([a, b], [1.0, 1.0]).tolist() == [2]


@ties
def test_ties_merging__zeros_are_in_no_mean():
    a, b, c = tensors([4, 0, 0, 0], [0, -6, 0, 2], [2, 0, 0, 4])
    assert merged([a, b, c], [1.0] * 3).tolist() == [3, -6, 0, 3]
    # trimmed entries are such zeros
    a, b = tensors([10, 1], [1, 10])
    assert merged([a, b], [1.0, 1.0], density=0.5).tolist() == [10, 10]


@ties
def test_ties_merging__negative_weights_vote_as_what_they_add():
    g = torch.Generator().manual_seed(0)
    t, s = (torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    assert torch.equal(merged([t, s], [-1.0, 1.0]), merged([-t, s], [1.0, 1.0]))
    half = t / 2
    torch.testing.assert_close(merged([t, half], [-1.0, 1.0]), -t)
    model = two()
    gw.scale(model, "minus", "a", -1.0)
    gw.combine(model, "one", {"a": -1.0, "b": 1.0}, "ties", density=0.4, r=32)
    gw.combine(model, "other", {"minus": 1.0, "b": 1.0}, "ties", density=0.4, r=32)
    for key in keys(model, "a"):
        assert relative(change(model, "one", key), change(model, "other", key)) < 1e-6


@ties
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_merging__peft_numbers(majority):
    peft = pytest.importorskip("peft.utils.merge_utils")
    g = torch.Generator().manual_seed(0)
    ts = [torch.randn(20, 10, generator=g, dtype=torch.float64) for _ in range(3)]
    # equal weights: the same rule; 0.25 * 200 has no rounding in it
    mine = merged(ts, [1.0] * 3, 0.25, majority)
    torch.testing.assert_close(mine, peft.ties(ts, torch.ones(3), 0.25, majority))
    # unequal ones: PEFT elects without the weights, which majority="unweighted" does too
    weights = [0.5, -2.0, 1.0]
    peer = peft.ties(ts, torch.tensor(weights, dtype=torch.float64), 0.25, "total")
    torch.testing.assert_close(merged(ts, weights, 0.25, "unweighted"), peer)
    assert relative(merged(ts, weights, 0.25, "total"), peer) > 0.1
    # where that is wrong: -t + t/2 gives -t/4, though both that count against t agree on -t
    t = ts[0]
    torch.testing.assert_close(peft.ties([t, t / 2], torch.tensor([-1.0, 1.0], dtype=torch.float64), 1.0), -t / 4)


@ties
def test_ties_merging__the_adapter_is_the_rule_on_dense_changes():
    model = two()
    made = gw.combine(model, "new", {"a": 0.7, "b": -1.5}, "ties", density=0.3, r=32)
    assert made.error < 1e-6
    cut = gw.combine(model, "cut", {"a": 0.7, "b": -1.5}, "ties", density=0.3, r=4)
    for fit in cut.sites:
        ts = [by_formula(model, n, fit.site) for n in "ab"]
        wanted = merged(ts, [0.7, -1.5], 0.3)
        assert relative(change(model, "new", fit.site), wanted) < 1e-5
        s = torch.linalg.svdvals(wanted)
        assert fit.error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-5)
