"""Hu et al. 2024: subtract from an expert what the anti-expert does not share with it."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert
from value_models import by_formula, change, keys, randomly, relative, weights_of

import graftwork as gw
from graftwork.core.errors import GraftError
from graftwork.values.subtract import rows

ext_sub = pytest.mark.system("ext-sub")


def two():
    model = bert()
    randomly(model, gw.LoRA(r=2, alpha=3.0, at="q, up"), "good", 1)
    randomly(model, gw.LoRA(r=3, alpha=1.0, rslora=True, at="q, up"), "bad", 2)
    return model


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@ext_sub
def test_ext_sub__nothing_is_taken_from_what_is_common():
    u = random(5, 7)
    for c in (0.2, 1.0, 3.0):
        torch.testing.assert_close(rows(u, c * u), u)
    torch.testing.assert_close(rows(u, random(5, 7, seed=1), 0.0), u, rtol=0, atol=0)
    model = two()
    gw.scale(model, "more", "good", 2.5)
    gw.subtract(model, "same", "good", "more")
    gw.subtract(model, "zero", "good", "bad", alpha=0.0)
    gw.combine(model, "plain", {"good": 1.0, "more": -1.0})
    for key in keys(model, "good"):
        wanted = by_formula(model, "good", key)
        assert relative(change(model, "same", key), wanted) < 1e-5
        assert relative(change(model, "zero", key), wanted) < 1e-5
        assert relative(change(model, "plain", key), -1.5 * wanted) < 1e-5


@ext_sub
def test_ext_sub__orthogonal_rows_of_one_length():
    a = 3.0
    q, _ = torch.linalg.qr(random(8, 8))
    u, v = a * q[:4], a * q[4:]
    torch.testing.assert_close(rows(u, v), u * 1.5 - v / 2)
    # opposite: nothing is common, all of v is taken;  zero rows
    torch.testing.assert_close(rows(u, -2 * u), 3 * u)
    zero = torch.zeros_like(u)
    torch.testing.assert_close(rows(u, zero), u)
    torch.testing.assert_close(rows(zero, v), zero, atol=1e-12, rtol=0)


@ext_sub
def test_ext_sub__the_deficiency_is_orthogonal_and_the_factors_do_not_matter():
    u, v = random(6, 9), random(6, 9, seed=1)
    n = u / u.norm(dim=1, keepdim=True) + v / v.norm(dim=1, keepdim=True)
    d = u - rows(u, v)
    assert ((d * n).sum(1).abs() < 1e-12).all()
    assert d.norm() > 1
    model = two()
    gw.subtract(model, "before", "good", "bad")
    before = {key: change(model, "before", key) for key in keys(model, "good")}
    for name, r in (("good", 2), ("bad", 3)):
        m = random(r, r, seed=5).float() + 3 * torch.eye(r)
        for delta in gw.adapters(model)[name].deltas():
            delta.down.data, delta.up.data = m @ delta.down.data, delta.up.data @ m.inverse()
    gw.subtract(model, "after", "good", "bad")
    for key, wanted in before.items():
        assert relative(change(model, "after", key), wanted) < 1e-4


@ext_sub
def test_ext_sub__row_by_row():
    u, v = random(6, 9), random(6, 9, seed=1)
    scaled = v.clone()
    scaled[2] *= 10
    before, after = rows(u, v), rows(u, scaled)
    assert torch.equal(before[[0, 1, 3, 4, 5]], after[[0, 1, 3, 4, 5]])
    assert relative(after[2], before[2]) > 0.5


@ext_sub
def test_ext_sub__the_adapter_is_the_formula_at_rank_five():
    model = two()
    weights = weights_of(model)
    made = gw.subtract(model, "new", "good", "bad", alpha=0.7)
    assert made.error < 1e-6
    assert {fit.r for fit in made.sites} == {5}  # each row is a sum of multiples of rows of both
    for key in keys(model, "good"):
        u, v = by_formula(model, "good", key), by_formula(model, "bad", key)
        by_hand = torch.stack(
            [
                a - 0.7 * (b - (b @ n) * n)
                for a, b in zip(u, v, strict=True)
                for n in [(a / a.norm() + b / b.norm()) / (a / a.norm() + b / b.norm()).norm()]
            ]
        )
        assert relative(change(model, "new", key), by_hand) < 1e-5
    cut = gw.subtract(model, "cut", "good", "bad", alpha=0.7, r=2)
    assert 0.05 < cut.error < 1
    assert all(torch.equal(weights[n], p) for n, p in weights_of(model).items())


@ext_sub
def test_ext_sub__bad_input():
    model = two()
    randomly(model, gw.Bottleneck(d=4), "soft", 3)
    for names, options, text in (
        (("good", "good"), {}, "the same adapter"),
        (("good", "x"), {}, "the adapter 'x'"),
        (("good", "soft"), {}, "changes activations"),
        (("good", "bad"), {"alpha": float("nan")}, "finite number"),
        (("good", "bad"), {"r": 0}, "r=0"),
    ):
        with pytest.raises(GraftError, match=text):
            gw.subtract(model, "new", *names, **options)
    assert list(gw.adapters(model)) == ["good", "bad", "soft"]
