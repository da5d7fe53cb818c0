"""Sehanobish et al. 2024: circulant, Toeplitz, Kronecker and low-displacement-rank updates."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, bert_of, ids, spread, vit_base
from torch import nn
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.forms.structured import KINDS, Structured, circulant, dense, product, skew, toeplitz

pytestmark = pytest.mark.system("surm")
BIG = torch.empty(0, dtype=torch.float64)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def rolled(c, sign=1.0):
    """Column j is c, moved down by j; what comes around is multiplied by the sign."""
    n = len(c)
    columns = []
    for j in range(n):
        column = torch.roll(c, j)
        factor = torch.ones(n, dtype=c.dtype)
        factor[:j] = sign
        columns.append(column * factor)
    return torch.stack(columns, dim=1)


def mirrored(v):
    return torch.stack([torch.stack([v[abs(i - j)] for j in range(len(v))]) for i in range(len(v))])


def filled(kind, n, out=None, r=1, k=2, seed=0, like=None):
    made = Structured(kind, n, n if out is None else out, r, k, like)
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return made


def by_hand(kind, made):
    a, b = made.first, made.second
    if kind == "circulant":
        return rolled(a * b)
    if kind == "toeplitz":
        return mirrored(b) @ mirrored(a)
    if kind == "ldr":
        return sum(rolled(g) @ rolled(h, -1.0) for g, h in zip(b, a, strict=True))
    return torch.kron(b, a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [7, 8])
def test_surm__fast_products_equal_dense_matrices(kind, n):
    made = filled(kind, n, r=n // 2 if n == 8 else 1)
    x = torch.randn(3, 5, n, requires_grad=True)
    expected = by_hand(kind, made)
    close(made.matrix(), expected)
    close(made(x), x @ expected.T)
    weights = torch.randn(3, 5, n)
    inputs = [x, made.first, made.second]
    fast = torch.autograd.grad((made(x) * weights).sum(), inputs)
    slow = torch.autograd.grad(((x @ by_hand(kind, made).T) * weights).sum(), inputs)
    for mine, theirs in zip(fast, slow, strict=True):
        assert theirs.any()
        close(mine, theirs, 1e-4)


def test_surm__kronecker_of_two_widths():
    made = filled("kronecker", 12, 20, r=4)
    x = torch.randn(5, 12)
    close(made.matrix(), torch.kron(made.second, made.first))
    close(made(x), x @ torch.kron(made.second, made.first).T)
    assert made.matrix().shape == (20, 12)


@pytest.mark.parametrize("n", [5, 6])
def test_surm__algebra_of_circulants(n):
    one, two = (torch.randn(n, dtype=torch.float64) for _ in range(2))
    first, eye = dense(circulant(one), n), torch.eye(n, dtype=torch.float64)
    close(first @ dense(circulant(two), n), dense(circulant(two), n) @ first, 1e-12)
    e1, e2 = eye[0], eye[1]
    assert torch.equal(dense(circulant(e1), n), eye)
    assert torch.equal(dense(skew(e1), n), eye)
    assert torch.equal(dense(toeplitz(e1), n), eye)
    assert torch.equal(torch.linalg.matrix_power(dense(circulant(e2), n), n), eye)
    assert torch.equal(torch.linalg.matrix_power(dense(skew(e2), n), n), -eye)
    x = torch.randn(3, n, dtype=torch.float64)
    moved = x
    for _ in range(n):
        moved = product(skew(e2), moved)
    close(moved, -x, 1e-12)


@pytest.mark.parametrize("kind", ["circulant", "toeplitz", "ldr"])
def test_surm__the_update_has_full_rank(kind):
    assert torch.linalg.matrix_rank(filled(kind, 9, like=BIG).matrix()) == 9
    made = filled("kronecker", 9, r=3, like=BIG)
    assert torch.linalg.matrix_rank(made.matrix()) == 9


def test_surm__low_displacement_rank_is_universal():
    n = 6
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(n, n, dtype=torch.float64, generator=generator)
    h = torch.randn(n, n, dtype=torch.float64, generator=generator)
    eye = torch.eye(n, dtype=torch.float64)

    def error(k):
        basis = torch.stack([(dense(circulant(e), n) @ dense(skew(h[i]), n)).flatten() for i in range(k) for e in eye])
        fit = torch.linalg.lstsq(basis.T, target.flatten()[:, None]).solution
        return (basis.T @ fit - target.flatten()[:, None]).abs().max()

    assert error(n) < 1e-8
    assert error(n // 2) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_surm__zero_at_init_and_counts(kind):
    model, x = bert(), ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.SURM(kind=kind, k=3), head=False)
    assert torch.equal(model(x).logits, before)
    assert adapter.num_parameters == 6 * {"circulant": 64, "toeplitz": 64, "kronecker": 64, "ldr": 192}[kind]
    model(x).logits.square().mean().backward()
    assert all(delta.structure.second.grad.any() and not delta.structure.first.grad.any() for delta in adapter.deltas())
    spread(adapter, 0.2)
    with torch.no_grad():
        out = model(x).logits
        gw.merge(model)
        close(model(x).logits, out)
        assert (out - before).abs().max() > 1e-4


def test_surm__counts_of_the_papers_models():
    for model in (bert_of("base"), vit_base()):
        assert counts(model, gw.SURM()) == (36 * 2 * 768,) * 2
        assert counts(model, gw.SURM(kind="toeplitz")) == (36 * 2 * 768,) * 2
        assert counts(model, gw.SURM(kind="ldr", k=1)) == (36 * 2 * 768,) * 2
        assert counts(model, gw.SURM(kind="kronecker", r=32)) == (36 * 2 * 768,) * 2
        assert counts(model, gw.SURM(kind="kronecker", r=32, at="up")) == (12 * (768 + 3072),) * 2


@torch.no_grad()
def test_surm__the_adapter_form():
    model = around(nn.Linear(6, 8))
    (delta,) = gw.graft(model, gw.SURMAdapter(at="linear", act="relu"), "a", head=False).deltas()
    spread(gw.adapters(model)["a"], 0.5)
    x = torch.randn(5, 6)
    h = x @ model.site.weight.T + model.site.bias
    c = delta.structure.first * delta.structure.second
    close(model(x), h + torch.relu(h @ rolled(c).T) + delta.shift)


def test_surm__other_shapes_are_refused():
    model = around(nn.Linear(9, 6))
    with pytest.raises(gw.GraftError, match="square"):
        gw.graft(model, gw.SURM(at="linear"), head=False)
    with pytest.raises(gw.GraftError, match="r=2 does not divide"):
        gw.graft(model, gw.SURM(kind="kronecker", r=2, at="linear"), head=False)
    gw.graft(model, gw.SURM(kind="kronecker", r=3, at="linear"), head=False)
