"""LyCORIS: the Kronecker product of a small matrix and a larger one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapter_models import llama_of, spread
from torch import nn
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.kronecker import factorized, kronecker_linear, kronecker_sum

pytestmark = pytest.mark.system("lokr")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(site, std=0.3, **options):
    """One layer with LoKr: the model, its delta."""
    torch.manual_seed(0)
    model = around(site)
    adapter = gw.graft(model, gw.LoKr(at="/site/", **options), head=False)
    spread(adapter, std)
    (delta,) = adapter.deltas()
    return model, delta


def change(model, delta):
    w = model.site.weight.detach()
    return (delta.weight(w.flatten(1)) - w.flatten(1)).detach().reshape(w.shape)


CASES = {
    "linear": (lambda: nn.Linear(24, 16), {"r": 8}),
    "linear of low rank": (lambda: nn.Linear(64, 48), {"r": 2, "decompose_both": True}),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), {"r": 8}),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2)), {"r": 8}),
    "conv2d of low rank": (lambda: nn.Conv2d(12, 18, 3), {"r": 1}),
    "conv2d in groups": (lambda: nn.Conv2d(12, 18, 3, groups=2), {"r": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_lokr__equals_numpy(case):
    make, options = CASES[case]
    model, delta = layer(make(), alpha=3.0, **options)
    w1, w2 = delta.left.matrix().detach().numpy(), delta.right.matrix().detach().numpy()
    kernel = model.site.weight.shape[2:]
    left = w1.reshape(*w1.shape, *(1 for _ in kernel))
    right = w2.reshape(w2.shape[0], -1, *kernel)
    expected = 3.0 / options["r"] * np.kron(left, right)
    assert expected.shape == tuple(model.site.weight.shape)
    close(change(model, delta), torch.from_numpy(expected))


@pytest.mark.parametrize("shapes", [((3, 4), (5, 2)), ((1, 6), (7, 3)), ((4, 4), (4, 4)), ((5, 2), (1, 8))])
def test_lokr__the_product_that_is_not_formed(shapes):
    torch.manual_seed(0)
    for k in (1, 3):
        a, b = (torch.randn(k, *shape) for shape in shapes)
        dense = sum(torch.kron(a[i], b[i]) for i in range(k))
        close(kronecker_sum(a, b), dense, 1e-6)
        x = torch.randn(2, 3, dense.shape[1])
        close(kronecker_linear(x, a, b), x @ dense.T, 1e-5)


def test_lokr__both_paths_on_a_linear_layer():
    for d, thin in ((20, False), (256, True)):
        model, delta = layer(nn.Linear(d, d), r=2, std=0.1)
        assert (3 * delta.work() <= d * d) == thin
        x = torch.randn(4, 3, d)
        close(model(x), F.linear(x, model.site.weight, model.site.bias) + F.linear(x, change(model, delta)), 1e-5)


def test_lokr__factorization():
    assert factorized(256) == (16, 16)
    assert factorized(128) == (8, 16)
    assert factorized(127) == (1, 127)
    assert factorized(128, 4) == (4, 32)
    assert factorized(100, 7) == (5, 20)  # the largest divisor that is not above it
    assert factorized(128, 20) == (8, 16)
    assert factorized(128, 64) == (64, 2)  # it divides


def test_lokr__counts_and_ranks():
    both = nn.ModuleDict({"one": nn.Linear(16, 24), "two": nn.Linear(24, 16)})
    assert counts(both, gw.LoKr(r=1, at="/one|two/")) == (52, 52)
    assert counts(both, gw.LoKr(r=8, at="/one|two/")) == (80, 80)
    # 64 x 64 and 64 x 64, the second of rank 8, for q and v of LLaMA2-7B
    assert counts(llama_of(4096, 32, 32, 11008), gw.LoKr()) == (64 * (64 * 64 + 8 * 128),) * 2
    conv = nn.ModuleDict({"one": nn.Conv2d(12, 18, 3)})  # 18 = 3 * 6, 12 = 3 * 4
    assert counts(conv, gw.LoKr(r=1, at="/one/")) == (9 + 6 + 4 * 9,) * 2
    assert counts(conv, gw.LoKr(r=1, at="/one/", effective=True)) == (9 + 6 + 4 + 9,) * 2
    model, delta = layer(nn.Linear(64, 64), r=2, decompose_both=True)
    ranks = [int(torch.linalg.matrix_rank(m.matrix().detach(), rtol=1e-5)) for m in (delta.left, delta.right)]
    assert ranks == [2, 2]
    assert torch.linalg.matrix_rank(change(model, delta), rtol=1e-5) == 4


@pytest.mark.parametrize("init", ["zero", "lycoris"])
def test_lokr__identity_and_first_gradients(init):
    torch.manual_seed(0)
    model = around(nn.Linear(64, 64))
    x = torch.randn(3, 64)
    before = model(x)
    adapter = gw.graft(model, gw.LoKr(r=2, init=init, at="/site/"), head=False)
    (delta,) = adapter.deltas()
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    idle = {"zero": {"right.up", "right.down"}, "lycoris": {"left.whole", "right.up"}}[init]
    assert {n for n, p in delta.named_parameters() if not p.grad.any()} == idle


def test_lokr__rows_dropped_are_made_up_for_only_if_asked():
    for scaled in (False, True):
        model, _ = layer(nn.Linear(256, 4 * 64), r=2, rank_dropout=0.5, rank_dropout_scale=scaled, std=0.1)
        x = torch.randn(3, 256)
        base = F.linear(x, model.site.weight, model.site.bias)
        whole = model(x) - base
        edit = model.train()(x) - base
        kept = edit.abs().amax(0) > 0
        assert 64 < kept.sum() < 192
        close(edit, torch.where(kept, whole * (256 / kept.sum() if scaled else 1), 0.0), 1e-4)
