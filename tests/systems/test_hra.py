"""Yuan et al. 2024: a chain of trained Householder reflections on the input of a weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama, spread
from torch import nn
from weight_models import around, gpt2, layer

import graftwork as gw

pytestmark = pytest.mark.system("hra")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def product(columns):
    """H_1 ... H_r, formed."""
    r = torch.eye(len(columns))
    for u in columns.T:
        r = r @ (torch.eye(len(u)) - 2 * torch.outer(u, u) / (u @ u))
    return r


@pytest.mark.parametrize("r", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_hra__orthogonal_of_low_rank_and_the_same_on_activations(r, gram_schmidt):
    model, delta, x = layer(gw.HRA(r=r, gram_schmidt=gram_schmidt, at="linear"))
    matrix = delta.weight(torch.eye(8))
    close(matrix @ matrix.T, torch.eye(8))
    assert torch.det(matrix).item() == pytest.approx((-1) ** r, abs=1e-5)
    assert torch.linalg.matrix_rank(matrix - torch.eye(8), rtol=1e-4) <= r
    columns = torch.linalg.qr(delta.columns).Q if gram_schmidt else delta.columns
    close(matrix, product(columns))
    close(model(x), F.linear(x, model.site.weight @ product(columns), model.site.bias), 1e-5)
    if gram_schmidt:
        close(matrix, matrix.T)
        close(matrix @ matrix, torch.eye(8))


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_hra__identity_for_an_even_number_of_reflections(make):
    model, x = make(), ids()
    before = model(x).logits
    gw.graft(model, gw.HRA(r=8, at="q, v"), head=False)
    close(model(x).logits, before, 1e-6)


def test_hra__otherwise_the_start_is_well_defined_and_said_not_to_be_the_identity():
    for method in (gw.HRA(r=3, at="linear"), gw.HRA(r=4, gram_schmidt=True, at="linear"), gw.HRA(init="random")):
        assert not method.identity
    for options in ({"r": 3}, {"gram_schmidt": True}):
        with pytest.raises(gw.GraftError, match="not the identity"):
            gw.HRA(init="pairs", **options)
    model = around(nn.Linear(16, 12))
    (delta,) = gw.graft(model, gw.HRA(r=4, gram_schmidt=True, at="linear"), head=False).deltas()
    matrix = delta.weight(torch.eye(16))
    close(matrix @ matrix.T, torch.eye(16))  # no direction of rounding noise among them
    assert (matrix - torch.eye(16)).norm().item() == pytest.approx(2 * 4**0.5, rel=1e-5)
    model(torch.randn(3, 16)).square().sum().backward()
    assert torch.isfinite(delta.columns.grad).all()


def test_hra__one_reflection_is_ether_with_one_block():
    model, delta, x = layer(gw.HRA(r=1, at="linear"))
    other, ether, _ = layer(gw.ETHER(at="linear"))
    ether.input.u.data = delta.columns.data.T.clone()
    close(delta.weight(model.site.weight), ether.weight(other.site.weight), 1e-6)
    close(model(x), other(x), 1e-6)


def test_hra__merge_and_unmerge_give_the_weight_back():
    """Here to the bit; by the reflections in reverse order to 1e-6."""
    model, delta, x = layer(gw.HRA(r=4, at="linear"))
    before, out = model.site.weight.detach().clone(), model(x)
    gw.merge(model)
    close(model(x), out)
    close(model.site.weight @ product(delta.columns.flip(-1)), before, 1e-6)
    gw.unmerge(model)
    assert torch.equal(model.site.weight, before)


def test_hra__equal_columns_in_any_number_are_stable():
    model, delta, x = layer(gw.HRA(r=8, at="linear"))
    with torch.no_grad():
        delta.columns.copy_(delta.columns[:, :1].expand(-1, 8))
    close(model(x), F.linear(x, model.site.weight, model.site.bias))


def test_hra__convolution_and_embedding():
    torch.manual_seed(0)
    conv = around(nn.Conv2d(3, 6, 3, padding=1))
    (delta,) = gw.graft(conv, gw.HRA(r=2, at="/site/"), head=False).deltas()
    spread(gw.adapters(conv)["default"])
    assert delta.columns.shape == (27, 2)
    w = (conv.site.weight.flatten(1) @ product(delta.columns)).view(6, 3, 3, 3)
    x = torch.randn(2, 3, 8, 8)
    close(conv(x), F.conv2d(x, w, conv.site.bias, padding=1))
    table = around(nn.Embedding(11, 6), nn.Linear(6, 3))
    (delta,) = gw.graft(table, gw.HRA(r=3, at="/site/"), head=False).deltas()
    assert delta.columns.shape == (6, 3)
    close(table(torch.arange(11)), table.last(table.site.weight @ product(delta.columns)))


def test_hra__penalty_is_the_distance_from_orthonormal_columns():
    model, delta, _ = layer(gw.HRA(r=4, penalty=0.3, at="linear"))
    v = delta.columns / delta.columns.norm(dim=0)
    close(gw.auxiliary_loss(model), 0.3 * (torch.eye(4) - v.T @ v).square().sum())
    assert gw.auxiliary_loss(layer(gw.HRA(r=4, at="linear"))[0]) == 0.0


def test_hra__counts():
    """r in per weight: 160 on two layers of 20, with r = 4."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 5))
    adapter = gw.graft(model, gw.HRA(r=4, at="/[02]/"), head=False)
    assert adapter.num_parameters == 160
    with pytest.raises(gw.GraftError, match="r <= 20"):
        gw.graft(model, gw.HRA(r=22, at="/0/"), "b", head=False)
