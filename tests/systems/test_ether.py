"""Bini et al. 2024: the weight is reflected at one or more hyperplanes (ETHER), or moved by two of them (ETHER+)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama_of, spread
from torch import nn
from weight_models import around, counts, gpt2, layer, mixtral

import graftwork as gw
from graftwork.products.dropout import drop

pytestmark = pytest.mark.system("ether")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def reflection(delta, d):
    """H itself: what the identity as a weight becomes."""
    return delta.weight(torch.eye(d))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_ether__reflection_is_orthogonal_with_a_fixed_distance(n):
    _, delta, _ = layer(gw.ETHER(blocks=n, at="linear"), 8, 8)
    h, eye = reflection(delta, 8), torch.eye(8)
    close(h @ h.T, eye)
    close(h, h.T)
    assert torch.det(h).item() == pytest.approx((-1) ** n, abs=1e-5)
    for block in h.unflatten(0, (n, -1)).unflatten(2, (n, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1):
        assert torch.det(block).item() == pytest.approx(-1, abs=1e-5)
    assert (h - eye).norm().item() == pytest.approx(2 * n**0.5, rel=1e-5)
    w = torch.randn(12, 8)
    close(torch.linalg.svdvals(delta.weight(w)), torch.linalg.svdvals(w))


def test_ether__equals_the_definition():
    for side, d in (("input", 8), ("output", 12)):
        model, delta, x = layer(gw.ETHER(blocks=2, side=side, at="linear"))
        u = getattr(delta, side).u
        blocks = [torch.eye(d // 2) - 2 * torch.outer(v, v) / (v @ v) for v in u]
        h = torch.block_diag(*blocks)
        w = model.site.weight @ h if side == "input" else h @ model.site.weight
        close(model(x), F.linear(x, w, model.site.bias))
        close(delta.weight(model.site.weight), w)


def test_ether__plus_leaves_the_output_at_init():
    for make in (bert, gpt2):
        model, x = make(), ids()
        before = model(x).logits
        gw.graft(model, gw.ETHERPlus(blocks=4), head=False)
        close(model(x).logits, before, 1e-6)


def test_ether__plus_distances():
    """||H - I|| = sqrt(2 - 2 cos^2): 0 for v = -u, sqrt(2) for v orthogonal to u, and never more."""
    _, delta, _ = layer(gw.ETHERPlus(side="input", at="linear"), 8, 8)
    planes = delta.input
    for seed in range(5):
        planes.v.data = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        cosine = F.cosine_similarity(planes.u, planes.v).item()
        distance = (reflection(delta, 8) - torch.eye(8)).norm().item()
        assert distance == pytest.approx((2 - 2 * cosine**2) ** 0.5, rel=1e-4)
        assert distance <= 2**0.5 + 1e-6
    u = planes.u.data
    planes.v.data = planes.v.data - (planes.v.data * u).sum() / (u * u).sum() * u
    assert (reflection(delta, 8) - torch.eye(8)).norm().item() == pytest.approx(2**0.5, rel=1e-5)


def test_ether__plus_on_both_sides_equals_the_definition():
    model, delta, x = layer(gw.ETHERPlus(blocks=2, at="linear"))

    def h(planes):
        outer = [torch.outer(u, u) / (u @ u) for u in planes.u], [torch.outer(v, v) / (v @ v) for v in planes.v]
        return torch.block_diag(*(torch.eye(len(a)) - a + b for a, b in zip(*outer, strict=True)))

    w = h(delta.output) @ model.site.weight @ h(delta.input)
    close(model(x), F.linear(x, w, model.site.bias))
    close(delta.weight(model.site.weight), w)


def test_ether__one_block_is_one_reflection_of_hra():
    model, delta, x = layer(gw.ETHER(at="linear"))
    other, hra, _ = layer(gw.HRA(r=1, at="linear"))
    hra.columns.data = delta.input.u.data.T.clone()
    close(model(x), other(x), 1e-6)


@pytest.mark.parametrize("method", [gw.ETHER(blocks=2, at="linear"), gw.ETHERPlus(blocks=2, at="linear")])
def test_ether__the_length_of_u_does_not_matter(method):
    model, delta, x = layer(method)
    out = model(x)
    with torch.no_grad():
        for p, factor in zip(delta.parameters(), (3.0, -0.2, 7.0, 0.5), strict=False):
            p.mul_(factor)
    close(model(x), out)
    model(x).square().sum().backward()
    for p in delta.parameters():  # normalised in the graph: no gradient along u
        close((p.grad * p).sum(-1), torch.zeros(p.shape[0]), 1e-4)
        assert p.grad.abs().max() > 1e-3


def test_ether__true_block_structure():
    """The second half of x does not enter the first half of H x."""
    _, delta, _ = layer(gw.ETHER(blocks=2, at="linear"), 8, 8)
    h = reflection(delta, 8)
    assert torch.equal(h[:4, 4:], torch.zeros(4, 4))
    assert torch.equal(h[4:, :4], torch.zeros(4, 4))
    assert (h[:4, :4] - torch.eye(4)).abs().max() > 0.1


def test_ether__smaller_side():
    (wide,) = gw.graft(around(nn.Linear(8, 12)), gw.ETHER(side="smaller", at="linear"), head=False).deltas()
    (tall,) = gw.graft(around(nn.Linear(12, 8)), gw.ETHER(side="smaller", at="linear"), head=False).deltas()
    assert wide.input is not None and wide.output is None and wide.input.u.shape == (1, 8)
    assert tall.output is not None and tall.input is None and tall.output.u.shape == (1, 8)


def test_ether__separate_vectors_for_a_packed_qkv_and_for_experts():
    model = gpt2()
    adapter = gw.graft(model, gw.ETHER(at="q, k, v"), head=False)
    assert len({tuple(d.input.u.flatten().tolist()) for d in adapter.deltas()}) == 6
    experts, x = mixtral(), ids()
    spread(gw.graft(experts, gw.ETHERPlus(blocks=2, at="expert.gate_up, expert.down"), "e", head=False))
    out = experts(x).logits
    gw.merge(experts)
    close(experts(x).logits, out)


def test_ether__dropout_is_on_the_input():
    model, delta, x = layer(gw.ETHER(dropout=0.5, at="linear"))
    model.train()
    torch.manual_seed(2)
    out = model(x)
    torch.manual_seed(2)
    close(out, F.linear(drop(x, 0.5), delta.weight(model.site.weight), model.site.bias))


def test_ether__counts():
    """Q and V of a 4096-wide model of 32 layers: 262,144, and 1,048,576 for ETHER+ on both sides."""
    model = llama_of(4096, 32, 32, 11008)
    assert counts(model, gw.ETHER()) == (262_144, 262_144)
    assert counts(model, gw.ETHER(blocks=32)) == (262_144, 262_144)
    assert counts(model, gw.ETHERPlus(blocks=32)) == (1_048_576, 1_048_576)
    assert counts(model, gw.ETHERPlus(side="input")) == (524_288, 524_288)


def test_ether__blocks_that_do_not_divide_are_refused():
    model = around(nn.Linear(10, 12))
    with pytest.raises(gw.GraftError, match="4 does not divide 10"):
        gw.graft(model, gw.ETHER(blocks=4, at="linear"), head=False)
    assert not gw.adapters(model)
