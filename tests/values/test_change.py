"""Changes as factors and as dense matrices are the same thing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.products.spectrum import of_factors, of_matrix
from graftwork.values.change import Change, weighted_sum
from graftwork.values.rules import keep_largest

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.sampled_from([(), (3,)]))
seeds = st.integers(0, 2**31)


def thin(shape, seed) -> Change:
    out, into, r, batch = shape
    g = torch.Generator().manual_seed(seed)
    down = torch.randn(*batch, r, into, generator=g, dtype=torch.float64)
    return Change(down, torch.randn(*batch, out, r, generator=g, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(shapes, seeds)
def test_the_spectrum_of_factors_is_that_of_their_product(shape, seed) -> None:
    change = thin(shape, seed)
    assert change.thin is not None
    by_factors, by_matrix = of_factors(*change.thin), of_matrix(change.dense)
    n = min(by_factors.s.shape[-1], by_matrix.s.shape[-1])
    torch.testing.assert_close(by_factors.s[..., :n], by_matrix.s[..., :n], atol=1e-10, rtol=1e-9)
    for one in (by_factors, by_matrix):
        down, up = one.factors(n)
        torch.testing.assert_close(up @ down, change.dense, atol=1e-9, rtol=1e-9)
        assert one.needed <= min(shape[:3])
        largest = one.v.gather(-1, one.v.abs().argmax(-1, keepdim=True))
        assert (largest >= 0).all()


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, st.lists(st.floats(-3, 3), min_size=1, max_size=4))
def test_a_sum_of_factors_is_the_sum_of_products(shape, seed, weights) -> None:
    out, into, r, batch = shape
    terms = [(w, thin((out, into, r + i % 3, batch), seed + i)) for i, w in enumerate(weights)]
    wanted = sum(w * c.dense for w, c in terms)
    summed = weighted_sum(terms)
    assert summed.r == sum(c.r or 0 for _, c in terms)
    torch.testing.assert_close(summed.dense, wanted, atol=1e-10, rtol=1e-10)
    mixed = weighted_sum([(w, Change(matrix=c.dense)) if i else (w, c) for i, (w, c) in enumerate(terms)])
    torch.testing.assert_close(mixed.dense, wanted, atol=1e-10, rtol=1e-10)
    a, b = terms[0][1], summed
    assert a.inner(b) == pytest.approx(float((a.dense * b.dense).sum()), abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.floats(0.01, 1.0), st.integers(1, 39))
def test_exactly_as_many_entries_stay_the_largest_and_the_first(values, density, at) -> None:
    t = torch.tensor(values, dtype=torch.float64)
    at = min(at, len(values) - 1)
    kept = torch.cat(keep_largest([t[:at], t[at:]], density))
    k = round(density * len(values))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))  # a stable order by magnitude
    wanted = torch.zeros_like(t)
    wanted[order[:k]] = t[order[:k]]
    assert torch.equal(kept, wanted)


def test_energy_and_ranks() -> None:
    one = of_matrix(torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0])))
    assert one.needed == 3
    assert [one.energy(r) for r in range(4)] == pytest.approx([0, 16 / 21, 20 / 21, 1])
    assert [one.rank(energy=e) for e in (0.5, 16 / 21 - 1e-9, 0.9, 0.99, 1.0)] == [1, 1, 2, 3, 3]
    assert one.rank(2, 1.0) == 2
    zero = of_matrix(torch.zeros(3, 4))
    assert (zero.needed, zero.rank(), zero.energy(1)) == (0, 0, 1.0)
