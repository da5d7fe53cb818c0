"""Kim et al. 2023: a parallel branch on the input and a sequential one on the output of a linear layer."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, llama, spread, vit_base
from torch import nn
from weight_models import around, counts, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("hydra")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(bias=True):
    torch.manual_seed(0)
    return around(nn.Linear(9, 13, bias=bias))


def grafted(model, **options):
    adapter = gw.graft(model, gw.Hydra(at="linear", **options), head=False)
    spread(adapter, 0.5)
    return next(adapter.deltas())


def branched(w, b, delta, x, s):
    """The definition, branch by branch; the second reads y0 with or without the first."""
    y0 = x @ w.T + b
    p, q = delta.parallel, delta.sequential
    first = s * ((x @ p.down.T + p.inner) @ p.up.T + p.outer)
    return y0, first, lambda y: s * ((y @ q.down.T + q.inner) @ q.up.T + q.outer)


@torch.no_grad()
def test_hydra__merged_equals_the_two_branches_with_all_biases():
    model, x = layer(), torch.randn(5, 9)
    w, b = model.site.weight.clone(), model.site.bias.clone()
    assert b.abs().min() > 0
    delta = grafted(model, r_parallel=3, r_sequential=2, scale=0.7)
    y0, first, second = branched(w, b, delta, x, 0.7)
    close(model(x), y0 + first + second(y0))
    without = y0 + first + second(y0 - b)  # as if B_s A_s b0 were left out of the merged bias
    gw.merge(model)
    close(model(x), y0 + first + second(y0))
    assert (model(x) - without).abs().max() > 1e-2


@torch.no_grad()
def test_hydra__the_sequential_branch_does_not_see_the_parallel_one():
    model, x = layer(), torch.randn(5, 9)
    w, b = model.site.weight.clone(), model.site.bias.clone()
    y0, first, second = branched(w, b, grafted(model, r_parallel=3, scale=0.7), x, 0.7)
    gw.merge(model)
    close(model(x), y0 + first + second(y0))
    assert (model(x) - (y0 + first + second(y0 + first))).abs().max() > 1e-2


@pytest.mark.parametrize("bias", [True, False])
def test_hydra__without_the_sequential_branch_it_is_lora(bias):
    one, two, x = layer(bias), layer(bias), torch.randn(5, 9)
    delta = grafted(one, r_parallel=3, r_sequential=0, scale=0.5, bias=False)
    assert delta.sequential is None
    (lora,) = gw.graft(two, gw.LoRA(r=3, alpha=1.5, at="linear"), head=False).deltas()
    lora.down.data, lora.up.data = delta.parallel.down.data, delta.parallel.up.data
    close(one(x), two(x))


@torch.no_grad()
def test_hydra__without_the_parallel_branch_it_multiplies_the_weight():
    model, x = layer(), torch.randn(5, 9)
    w, b = model.site.weight.clone(), model.site.bias.clone()
    delta = grafted(model, r_parallel=0, r_sequential=4, scale=0.5, bias=False)
    assert delta.parallel is None
    factor = torch.eye(13) + 0.5 * delta.sequential.up @ delta.sequential.down
    close(model(x), x @ (factor @ w).T + factor @ b)
    gw.merge(model)
    close(model.site.weight, factor @ w)
    close(model.site.bias, factor @ b)


@pytest.mark.parametrize("make", [bert, llama])
def test_hydra__merged_models_and_no_branch(make):
    model = make()
    x = torch.arange(3, 17).view(2, 7)
    spread(gw.graft(model, gw.Hydra(scale=1.0), head=False), 0.1)
    with torch.no_grad():
        out = model(x).logits
        gw.merge(model)
        close(model(x).logits, out, 1e-4)
    with pytest.raises(gw.GraftError, match="no branch"):
        gw.Hydra(r_parallel=0, r_sequential=0)


def test_hydra__oracles_of_parameters():
    assert counts(vit_base(), gw.Hydra()) == (239_712, 239_712)
    language = gw.Hydra(r_parallel=4, r_sequential=8, scale=1.0, bias=False, init="kaiming", at="down")
    assert counts(roberta_of("base"), language) == (331_776, 331_776)
