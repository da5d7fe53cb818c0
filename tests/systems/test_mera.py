"""He et al. 2023: hidden units are aligned by optimal transport before adapters are averaged."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_models import bert, ids
from value_models import by_formula, change, keys, randomly, relative

import graftwork as gw
from graftwork.values.transport import plan

mera = pytest.mark.system("mera")


def permuted(model, name, new, seed):
    """The adapter `name` again, its hidden units in another order at every site."""
    gw.average(model, new, [name])
    for i, delta in enumerate(gw.adapters(model)[new].deltas()):
        order = torch.randperm(delta.down.shape[0], generator=torch.Generator().manual_seed(seed + i))
        delta.down.data, delta.up.data = delta.down.data[order], delta.up.data[:, order]
        if getattr(delta, "down_bias", None) is not None:
            delta.down_bias.data = delta.down_bias.data[order]


def tensors(model, name):
    return gw.adapters(model)[name].state_dict()


@mera
def test_mera__a_permuted_copy_is_put_in_order():
    model, x = bert(), ids()
    randomly(model, gw.Bottleneck(d=6), "a", 1)
    permuted(model, "a", "copy", 3)
    with torch.no_grad():
        gw.activate(model, "a")
        out = model(x).logits
        gw.activate(model, "copy")
        torch.testing.assert_close(model(x).logits, out, atol=1e-5, rtol=1e-5)  # the order means nothing
        gw.average(model, "aligned", ["a", "copy"], align=True)
        assert torch.equal(model(x).logits, out)
        gw.average(model, "plain", ["a", "copy"])
        assert (model(x).logits - out).abs().max() > 1e-3
    assert all(torch.equal(t, tensors(model, "a")[n]) for n, t in tensors(model, "aligned").items())


@mera
def test_mera__lora_has_hidden_units_too():
    model = bert()
    randomly(model, gw.LoRA(r=4, at="q, up"), "a", 1)
    permuted(model, "a", "copy", 3)
    gw.average(model, "aligned", ["a", "copy"], align=True)
    gw.average(model, "plain", ["a", "copy"])
    for key in keys(model, "a"):
        assert torch.equal(change(model, "aligned", key), change(model, "a", key))
        assert relative(change(model, "plain", key), by_formula(model, "a", key)) > 0.1


@mera
def test_mera__one_adapter_and_equal_ones():
    model = bert()
    randomly(model, gw.Bottleneck(d=6), "a", 1)
    gw.average(model, "one", ["a"], align=True)
    for n in ("b", "c"):
        gw.average(model, n, ["a"])
    gw.average(model, "equal", ["a", "b", "c"], align=True)
    for made in ("one", "equal"):
        assert all(torch.equal(t, tensors(model, "a")[n]) for n, t in tensors(model, made).items())


@mera
def test_mera__the_transport():
    g = torch.Generator().manual_seed(0)
    cost = torch.rand(5, 5, generator=g, dtype=torch.float64)
    t = plan(cost)
    assert (t.sum(0) - 1 / 5).abs().max() < 1e-6
    assert (t.sum(1) - 1 / 5).abs().max() < 1e-6
    assert (t >= 0).all()
    # no cheaper plan: the minimum over the corners of the polytope, which are the permutations
    cheapest = min(sum(float(cost[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(5)))
    assert float((5 * t * cost).sum()) == pytest.approx(cheapest)
    zero_diagonal = torch.rand(6, 6, generator=g, dtype=torch.float64) + 0.1
    zero_diagonal.fill_diagonal_(0.0)
    assert torch.equal(6 * plan(zero_diagonal), torch.eye(6, dtype=torch.float64))


@mera
def test_mera__the_result_has_the_size_of_one():
    model = bert()
    for seed, name in enumerate("abcd", 1):
        randomly(model, gw.Bottleneck(d=6), name, seed)
    sizes = {gw.average(model, f"of{k}", list("abcd")[:k], align=True).num_parameters for k in (1, 2, 3, 4)}
    assert sizes == {gw.adapters(model)["a"].num_parameters} == {2 * 2 * (2 * 6 * 32 + 6 + 32)}
    # the first is the anchor: aligned ones are nearer to it than they were
    a = tensors(model, "a")
    far, near = (
        sum(float((tensors(model, n)[k] - t).square().sum()) for k, t in a.items())
        for n in (gw.average(model, "plain", ["a", "b"]).name, "of2")
    )
    assert near < far
    # and it can be trained on
    adapter = gw.adapters(model)["of4"]
    adapter.trainable = True
    gw.activate(model, "of4")
    model(ids()).logits.square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
