"""SoKA: trained terms of the Kronecker-product SVD of a weight, as many as its spectrum asks for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from adapter_models import llama
from torch import nn
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.forms.kronecker import kronecker_linear, kronecker_sum, rearranged
from graftwork.methods.weight.soka import elbow, picked

pytestmark = pytest.mark.system("soka")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(d_in, d_out, **options):
    torch.manual_seed(0)
    model = around(nn.Linear(d_in, d_out))
    (delta,) = gw.graft(model, gw.SoKA(at="/site/", **options), head=False).deltas()
    return model, delta


@pytest.mark.parametrize(("shape", "p", "m"), [((12, 20), 3, 4), ((12, 20), 12, 1), ((7, 9), 1, 3), ((8, 8), 4, 2)])
def test_soka__rearrangement(shape, p, m):
    """Block by block, and back; of a Kronecker product it has rank 1, and its one term is the product."""
    torch.manual_seed(0)
    w = torch.randn(shape)
    q, n = shape[0] // p, shape[1] // m
    r = rearranged(w, p, m)
    for i in range(p):
        for j in range(m):
            assert torch.equal(r[i * m + j], w[i * q : (i + 1) * q, j * n : (j + 1) * n].flatten())
    assert r.flatten().sort().values.equal(w.flatten().sort().values)
    eye = torch.eye(p * m).reshape(p * m, p, m)  # R's rows are the blocks: their sum with unit matrices is R^-1
    assert torch.equal(kronecker_sum(eye, r.reshape(p * m, q, n)), w)
    a, b = torch.randn(p, m), torch.randn(q, n)
    u, s, v = torch.linalg.svd(rearranged(torch.kron(a, b), p, m), full_matrices=False)
    assert not (s[1:] > 1e-5 * s[0]).any()
    close(torch.kron((s[0] * u[:, 0]).view(p, m), v[0].view(q, n)), torch.kron(a, b), 1e-4)


@pytest.mark.parametrize("shape", [(24, 20), (256, 144)])
def test_soka__the_first_terms(shape):
    """All of them are the weight; the first r leave the sum of the squares of the others."""
    d_out, d_in = shape
    model, delta = layer(d_in, d_out, r=4)
    w = model.site.weight.detach()
    s = torch.linalg.svdvals(rearranged(w, *delta.left.shape[1:]))
    principal = kronecker_sum(*delta._principal())
    assert (w - principal).square().sum().item() == pytest.approx(s[4:].square().sum().item(), rel=1e-3)
    close(delta.values, s[:4], 2e-3)
    x = torch.randn(3, d_in)
    assert torch.equal(model(x), F.linear(x, w, model.site.bias))
    if d_out == 24:
        model, delta = layer(d_in, d_out, r=len(s))
        assert (kronecker_sum(*delta._trained()) - w).abs().max() < 1e-4


def test_soka__the_product_that_is_not_formed():
    """vec(V X U^T) of column-major X is (U (x) V) x for rectangular factors."""
    torch.manual_seed(0)
    u, v, x = torch.randn(1, 3, 5), torch.randn(1, 4, 2), torch.randn(10)
    column_major = x.view(5, 2).T  # X [n2, n1]
    y = (v[0] @ column_major @ u[0].T).T.flatten()
    close(y, torch.kron(u[0], v[0]) @ x)
    close(kronecker_linear(x, u, v), y)


@pytest.mark.parametrize(("d", "r"), [(24, 2), (256, 1)])  # with the update, and with products that do not form it
def test_soka__trained_away_from_the_weight(d, r):
    model, delta = layer(d, d, r=r)
    w = model.site.weight.detach()
    with torch.no_grad():
        start = sum(delta.values[k] * torch.kron(delta.left[k], delta.right[k]) for k in range(r))
        for p in delta.parameters():
            p.add_(0.1 * torch.randn_like(p))
        new = sum(delta.values[k] * torch.kron(delta.left[k], delta.right[k]) for k in range(r))
    x = torch.randn(3, 2, d)
    out = model(x)
    close(out, F.linear(x, w - start + new, model.site.bias), 1e-4)
    gw.merge(model)
    close(model(x), out, 1e-4)
    gw.unmerge(model)
    assert torch.equal(model.site.weight, w)


def test_soka__picked_ranks():
    steep = torch.tensor([10.0] + [1.0] * 19)
    assert elbow(steep) == 1
    assert picked(steep, 0.9) == 1
    for n in (7, 10, 20, 33):
        flat = torch.full((n,), 2.0)
        assert elbow(flat) == n
        assert picked(flat, 0.9) == math.ceil(0.9 * n)
        assert elbow(torch.linspace(5, 1, n)) == n  # straight
    three = torch.tensor([9.0, 8.0, 7.0, 0.3, 0.2, 0.1])
    assert elbow(three) == 3
    assert picked(three, 0.9999) == 3
    assert picked(three, 0.5) == 2


def test_soka__each_weight_has_its_own_rank():
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(16, 16), "two": nn.Linear(16, 16)})
    with torch.no_grad():
        a, b = torch.randn(2, 3, 4, 4)
        model["one"].weight.copy_(sum(torch.kron(x, y) for x, y in zip(a, b, strict=True)))
        model["two"].weight.copy_(torch.kron(a[0], b[0]))
    adapter = gw.graft(model, gw.SoKA(tau=0.9999, at="/one|two/"), head=False)
    ranks = {site.path: delta.values.shape[0] for site, delta in zip(adapter.sites, adapter.deltas(), strict=True)}
    gw.remove(model, adapter.name)
    assert ranks["two"] == 1 and 1 < ranks["one"] <= 3
    assert counts(model, gw.SoKA(tau=0.9999, at="/one|two/")) == (sum(ranks.values()) * 33,) * 2
    assert counts(model, gw.SoKA(r_max=1, at="/one|two/")) == (2 * 33,) * 2


def test_soka__stored_without_what_the_weight_says(tmp_path):
    model = llama()
    adapter = gw.graft(model, gw.SoKA(), "a", head=False)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x = torch.arange(3, 12)[None]
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    again = llama()
    loaded = gw.load(again, tmp_path / "a")
    assert torch.equal(again(x).logits, out)
    stored = {name.rsplit("/", 1)[1] for name in loaded.state_dict()}
    assert stored == {"values", "left", "right", "first_values"}
    other = llama()
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    delta, theirs = (next(a.deltas()) for a in (loaded, gw.graft(other, gw.SoKA(), "a", head=False)))
    with pytest.raises(gw.GraftError, match="singular values"):
        theirs.restore(delta.state_dict())


def test_soka__counts_and_refusals():
    site = nn.ModuleDict({"one": nn.Linear(4096, 4096, device="meta")})
    assert counts(site, gw.SoKA(r=2, at="/one/")) == (2 * 8193,) * 2
    with pytest.raises(gw.GraftError, match="which has 9 terms"):
        layer(9, 9, r=10)
