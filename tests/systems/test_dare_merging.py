"""Yu et al. 2023: entries of the changes are dropped at random and the rest is rescaled."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert
from test_ties_merging import two
from value_models import by_formula, change, keys, relative

import graftwork as gw
from graftwork.core.errors import GraftError
from graftwork.values.rules import drop, elect

dare = pytest.mark.system("dare-merging")


@dare
def test_dare_merging__the_mean_over_seeds_is_the_sum():
    g = torch.Generator().manual_seed(0)
    ts = [torch.randn(6, 5, generator=g, dtype=torch.float64) for _ in range(2)]
    weights, density, n = [0.7, -1.2], 0.3, 2000
    wanted = sum(w * t for w, t in zip(weights, ts, strict=True))
    total = torch.zeros_like(wanted)
    for seed in range(n):
        total += sum(w * drop(t, density, seed, name, "site") for w, t, name in zip(weights, ts, "ab", strict=True))
    # an entry's variance is sum_e (w t)^2 (1 - rho) / rho
    variance = sum((w * t).square() for w, t in zip(weights, ts, strict=True)) * (1 - density) / density
    assert ((total / n - wanted).abs() <= 4 * (variance / n).sqrt()).all()


@dare
def test_dare_merging__a_seed_gives_the_same_draw():
    t = torch.ones(40, 30, dtype=torch.float64)
    assert torch.equal(drop(t, 0.5, 7, "a", "x"), drop(t, 0.5, 7, "a", "x"))
    for other in ((8, "a", "x"), (7, "b", "x"), (7, "a", "y")):  # own draws for each seed, adapter and site
        agree = (drop(t, 0.5, 7, "a", "x") == drop(t, 0.5, *other)).double().mean()
        assert abs(float(agree) - 0.5) < 0.06
    results = []
    for noise in (1, 2):
        model = two()
        torch.manual_seed(noise)  # torch's own generator has no part in it, and is left alone
        state = torch.get_rng_state()
        gw.combine(model, "new", {"a": 0.5, "b": 0.5}, "dare_linear", density=0.5, seed=3, r=4)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(gw.adapters(model)["new"].state_dict())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    gw.combine(model, "other", {"a": 0.5, "b": 0.5}, "dare_linear", density=0.5, seed=4, r=4)
    other = gw.adapters(model)["other"].state_dict()
    assert not all(torch.equal(results[0][n], other[n]) for n in other)
    # known numbers: another machine, or another version of torch, would show
    first = drop(torch.ones(8, dtype=torch.float64), 0.5, 0, "a", "site")
    assert first.tolist() == [2.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 0.0]


@dare
def test_dare_merging__density_one_drops_nothing():
    model = two()
    weights = {"a": 0.7, "b": -1.2}
    gw.combine(model, "sum", weights, "dare_linear", density=1.0, r=32)
    gw.combine(model, "cat", weights)
    gw.combine(model, "elected", weights, "dare_ties", density=1.0, r=32)
    gw.combine(model, "ties", weights, "ties", density=1.0, r=32)
    for key in keys(model, "a"):
        assert relative(change(model, "sum", key), change(model, "cat", key)) < 1e-5
        assert relative(change(model, "elected", key), change(model, "ties", key)) < 1e-6


@dare
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_merging__the_share_that_is_kept(density):
    n, rounds = 60 * 50, 40
    t = torch.ones(60, 50, dtype=torch.float64)
    counts = torch.tensor([float((drop(t, density, seed, "a", "s") != 0).sum()) for seed in range(rounds)])
    sd = (n * density * (1 - density)) ** 0.5
    assert ((counts - n * density).abs() < 4.5 * sd).all()
    assert abs(float(counts.mean()) - n * density) < 4 * sd / rounds**0.5
    assert 0.6 < float(counts.std()) / sd < 1.5
    assert set(drop(t, density, 0, "a", "s").unique().tolist()) == {0.0, 1 / density}


@dare
def test_dare_merging__the_adapter_is_the_rule_on_dense_changes():
    model = two()
    gw.combine(model, "new", {"a": 0.7, "b": -1.2}, "dare_ties", density=0.4, seed=5, r=32)
    for key in keys(model, "a"):
        kept = [drop(by_formula(model, n, key), 0.4, 5, n, key) for n in "ab"]
        assert relative(change(model, "new", key), elect(kept, [0.7, -1.2])) < 1e-4


@dare
@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_merging__density_zero_is_refused(how):
    model = bert()
    two(model)
    with pytest.raises(GraftError, match="above 0, at most 1"):
        gw.combine(model, "new", {"a": 0.5, "b": 0.5}, how, density=0.0)
    assert list(gw.adapters(model)) == ["a", "b"]
