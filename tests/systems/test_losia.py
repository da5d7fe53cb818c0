"""Wang et al. 2025: a block of rows and columns of every weight, trained in turn and moved by a schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from adapter_models import ids, llama, llama_of, spread
from torch import nn
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.forms.localise import candidates, largest_block, sensitivity

pytestmark = pytest.mark.system("losia")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(model, adapter, steps, start=0, optimizer=None, after=None):
    x, target = ids(), normal(2, 7, 60, seed=4)
    optimizer = optimizer or torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    for t in range(start, start + steps):
        optimizer.zero_grad()
        (model(x).logits - target).square().mean().backward()
        optimizer.step()
        gw.step(model, 0.5, optimizer)
        if after is not None:
            after(t, optimizer)
    model.eval()
    return optimizer


def block_of(delta):
    mask = torch.zeros(delta.view.shape, dtype=torch.bool)
    mask[delta.rows.long()[:, None], delta.columns.long()] = True
    return mask


def test_losia__only_visited_blocks_change():
    model = llama()
    backbone = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = gw.graft(model, gw.LoSiA(p=0.25, period=3), head=False, seed=0)
    visited = {key: block_of(d) for key, d in adapter.parts[0].deltas.items()}
    first = {key: mask.clone() for key, mask in visited.items()}

    def after(t, optimizer):
        for key, delta in adapter.parts[0].deltas.items():
            visited[key] |= block_of(delta)

    train(model, adapter, 14, after=after)
    assert any(not torch.equal(visited[key], first[key]) for key in visited)
    for key, delta in adapter.parts[0].deltas.items():
        change = delta.update().detach()
        assert torch.equal(change != 0, visited[key])
    gw.merge(model)
    for site in adapter.sites:
        now = site.module.weight
        unmoved = ~visited[site.key]
        assert torch.equal(now[unmoved], backbone[f"{site.path}.weight"][unmoved])


@pytest.mark.parametrize("bias", [True, False])
def test_losia__the_gradient_is_that_of_the_whole_weight_at_the_block(bias):
    model = around(nn.Linear(24, 16, bias=bias))
    adapter = gw.graft(model, gw.LoSiA(p=0.25, at="linear"), head=False)
    (delta,) = adapter.deltas()
    spread(adapter)
    delta.left.copy_(normal(16, 24, seed=5))
    x, g = normal(3, 5, 24).requires_grad_(), normal(3, 5, 16, seed=1)
    w = (model.site.weight + delta.update()).detach().requires_grad_()
    y = F.linear(x, w, model.site.bias)
    want_x, want_w = torch.autograd.grad(y, (x, w), g)
    saved = []
    for training in (False, True):  # in training its layer is looked at, by the full gradient
        model.train(training)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            mine = model(x)
        if not training:
            assert (3, 5, 6) in saved and (3, 5, 24) not in saved  # x[:, C] alone
        g_x, g_block = torch.autograd.grad(mine, (x, delta.block), g)
        torch.testing.assert_close(mine, y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(g_x, want_x, atol=1e-5, rtol=1e-5)
        at = want_w[delta.rows.long()[:, None], delta.columns.long()]
        torch.testing.assert_close(g_block, at, atol=1e-5, rtol=1e-5)


def test_losia__all_rules_find_the_block_of_a_product():
    a, b = normal(20).abs() + 0.1, normal(30, seed=1).abs() + 0.1
    rows, columns = a.topk(5).indices.sort().values, b.topk(7).indices.sort().values
    for found in candidates(torch.outer(a, b), 5, 7):
        assert torch.equal(found[0], rows)
        assert torch.equal(found[1], columns)


@pytest.mark.parametrize("seed", range(5))
def test_losia__the_best_of_the_three_is_taken(seed):
    q = normal(20, 30, seed=seed).abs() ** 4
    sums = [q[r][:, c].sum() for r, c in candidates(q, 5, 7)]
    r, c = largest_block(q, 5, 7)
    assert len(r) == 5 and len(c) == 7
    assert q[r][:, c].sum() >= max(sums)
    assert len({float(s) for s in sums}) > 1  # the rules differ


def test_losia__scores_are_smoothed_sensitivity_times_uncertainty():
    q = normal(4, 5)
    for taylor, expected in (("mixed", (q - 0.5 * q * q).abs()), ("first", q.abs()), ("second", q * q)):
        torch.testing.assert_close(sensitivity(q, taylor), expected)
    model = around(nn.Linear(12, 8))
    adapter = gw.graft(model, gw.LoSiA(p=0.25, period=9, beta1=0.8, beta2=0.6, at="linear"), head=False)
    (delta,) = adapter.deltas()
    mean, uncertain = torch.zeros(8, 12), torch.zeros(8, 12)
    model.train()
    for t in range(4):
        x = normal(6, 12, seed=t)
        w = (model.site.weight + delta.update()).detach().requires_grad_()
        F.linear(x, w, model.site.bias).square().sum().backward()
        model(x).square().sum().backward()
        gw.step(model, 0.1)
        q = w.detach() * w.grad
        now = (q - 0.5 * q * q).abs()
        mean = 0.8 * mean + 0.2 * now
        uncertain = 0.6 * uncertain + 0.4 * (now - mean).abs()
    torch.testing.assert_close(delta.mean, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(delta.spread, uncertain, atol=1e-4, rtol=1e-4)
    delta.move()
    r, c = largest_block(mean * uncertain, 2, 3)
    assert torch.equal(delta.rows.long(), r)
    assert torch.equal(delta.columns.long(), c)


@pytest.mark.parametrize("together", [False, True])
def test_losia__layers_take_turns(together):
    model, period = llama(layers=3), 4
    adapter = gw.graft(model, gw.LoSiA(p=0.25, period=period, together=together), head=False, seed=0)
    moved = {layer: [] for layer in range(3)}

    def after(t, optimizer):
        for site in adapter.sites:
            delta = adapter.parts[0].deltas[site.key]
            if int(delta.since) == 0:
                moved[site.layer].append(t)
                assert delta.block not in optimizer.state  # no moments
                assert not delta.block.any()
                assert not delta.mean.numel() and not delta.spread.numel()

    train(model, adapter, 2 * 3 * period + period, after=after)
    sites = len(adapter.sites) // 3
    for layer in range(3):
        slot = 0 if together else layer
        turns = [t for t in range(7 * period) if (t + 1) % period == 0 and t // period % 3 == slot]
        assert moved[layer] == [t for t in turns for _ in range(sites)]
        assert all(b - a == 3 * period for a, b in pairwise(turns))


def test_losia__steps_are_shortened_after_a_move():
    """Of plain SGD's steps on a constant gradient, 0, 1/T, 2/T ... are left, and whole ones from then on."""
    model = around(nn.Linear(12, 8))
    adapter = gw.graft(model, gw.LoSiA(p=0.25, period=4, at="linear"), head=False)
    (delta,) = adapter.deltas()
    sizes = []
    for _ in range(16):
        before = delta.update().detach().clone()
        delta.block.data -= 1.0
        delta.looked_at = False
        gw.step(model, 0.1)
        sizes.append(float((before - delta.update().detach()).max()))
    assert sizes == [1.0] * 16  # nothing was looked at, so nothing moved
    delta.mean, delta.spread = normal(8, 12).abs(), normal(8, 12).abs()
    delta.move()
    sizes = []
    for _ in range(6):
        before = delta.update().detach().clone()
        delta.block.data -= 1.0
        delta.shorten(4)
        sizes.append(float((before - delta.update().detach()).max()))
    assert sizes == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-5)


def test_losia__a_move_changes_nothing_and_a_file_holds_what_was_visited(tmp_path):
    model, x = llama(), ids()
    adapter = gw.graft(model, gw.LoSiA(p=0.25, period=3), "a", head=False, seed=0)
    train(model, adapter, 8)
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    gw.save(model, "a", tmp_path / "resume", resume=True)
    for folder in ("a", "resume"):
        again = llama()
        loaded = gw.load(again, tmp_path / folder, trainable=True)
        assert torch.equal(again(x).logits, out)
        pairs = zip(adapter.deltas(), loaded.deltas(), strict=True)
        assert all(torch.equal(a.rows, b.rows) and torch.equal(a.columns, b.columns) for a, b in pairs)
    sgd = torch.optim.SGD(adapter.parameters(), lr=0.1)
    train(model, adapter, 7, optimizer=sgd)
    train(again, loaded, 7, optimizer=torch.optim.SGD(loaded.parameters(), lr=0.1))
    assert torch.equal(again(x).logits, model(x).logits)


def test_losia__counts():
    """LLaMA-7B, p = 1/8: a sixty-fourth of the adapted layers."""
    model = llama_of(4096, 32, 32, 11008)
    expected = 32 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert counts(model, gw.LoSiA()) == (expected, expected)
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert expected * 64 == linear


def test_losia__too_small_a_share_is_refused():
    model = around(nn.Linear(6, 4))
    with pytest.raises(gw.GraftError, match="larger p"):
        gw.graft(model, gw.LoSiA(p=0.1, at="linear"), head=False)
    assert type(model.site) is nn.Linear
