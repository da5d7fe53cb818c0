"""Guo et al. 2020: a difference behind hard-concrete gates, projected to the largest, and trained on."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from adapter_models import bert, bert_of, ids, spread
from safetensors.torch import load_file
from torch import nn
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.forms.difference import budget, size

pytestmark = pytest.mark.system("diff-pruning")


def quiet():
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def single(**options):
    """One linear layer, and its delta."""
    model = around(nn.Linear(12, 10))
    adapter = gw.graft(model, gw.DiffPruning(density=0.1, at="linear", **options), head=False)
    (delta,) = adapter.deltas()
    return model, adapter, delta


def test_diff_pruning__penalty_and_its_gradient():
    model, adapter, delta = single(l0=1.0, structured=False)
    spread(adapter, 2.0)
    gw.auxiliary_loss(model).backward()
    for alpha in delta.alpha.values():
        s = alpha.detach().sigmoid()
        torch.testing.assert_close(alpha.grad, s * (1 - s))
    # the constant of gates that are not symmetric: -log(-low / high) = log 2
    model, adapter, delta = single(l0=0.5, structured=False, low=-1.0, high=2.0)
    spread(adapter)
    shifted = sum((a - math.log(1 / 2)).sigmoid().sum() for a in delta.alpha.values())
    torch.testing.assert_close(gw.auxiliary_loss(model), 0.5 * shifted)


@pytest.mark.parametrize("penalty", ["sum", "product"])
def test_diff_pruning__groups(penalty):
    model, adapter, delta = single(l0=1.0, penalty=penalty)
    spread(adapter)
    expected = 0.0
    for name, alpha in delta.alpha.items():
        own, group = alpha.sigmoid().sum(), delta.group[name].sigmoid()
        expected = expected + (own + group if penalty == "sum" else own * group)
    torch.testing.assert_close(gw.auxiliary_loss(model), expected)
    # a closed group takes its whole tensor, and no other
    delta.group["change"].data.fill_(-20.0)
    assert not delta.value("change").any()
    assert delta.value("shift").any()
    w = model.site.weight
    assert torch.equal(delta.weight(w), w)


def test_diff_pruning__a_heavy_penalty_closes_the_gates():
    model, adapter, delta = single(l0=1e4)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    opened = []
    for _ in range(30):
        optimizer.zero_grad()
        gw.auxiliary_loss(model).backward()
        optimizer.step()
        opened.append(torch.cat([a.detach().sigmoid().flatten() for a in delta.alpha.values()]).mean())
    assert all(b < a for a, b in pairwise(opened))
    assert opened[-1] < 0.5 < opened[0]


def test_diff_pruning__the_gate():
    model, _, delta = single()
    alpha = torch.linspace(-6, 6, 24, requires_grad=True)
    z = delta.gate(alpha)
    s = alpha.detach().sigmoid()
    bar = 3 * s - 1.5
    torch.testing.assert_close(z, bar.clamp(0, 1))
    z.sum().backward()
    torch.testing.assert_close(alpha.grad, ((bar > 0) & (bar < 1)) * 3 * s * (1 - s))
    # in training, drawn: P(z = 0) = P(s < 1/2), and another draw each time
    model.train()
    torch.manual_seed(0)
    alpha = torch.full((200_000,), 1.0, requires_grad=True)
    z = delta.gate(alpha)
    for value, odds in ((0.0, 0.0), (1.0, math.log(5))):  # s_bar <= 0 where s <= 1/2, >= 1 where s >= 5/6
        below = 1 / (1 + math.exp(1.0 - odds))  # log u - log(1 - u) is logistic
        share = float((z == value).float().mean())
        assert share == pytest.approx(below if value == 0.0 else 1 - below, abs=5e-3)
    assert not torch.equal(delta.gate(alpha), z)
    assert ((z > 0) & (z < 1)).any()


def test_diff_pruning__identity_whatever_the_gates_say():
    model, x = quiet(), ids()
    before = model(x).logits
    gw.graft(model, gw.DiffPruning(), head=False)
    assert torch.equal(model(x).logits, before)
    assert torch.equal(model.train()(x).logits, before)


def train(model, adapter, steps, total, start=0):
    x = ids()
    target = torch.randn(2, 2, generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.AdamW(adapter.groups(1e-2), weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = min(group["lr"], 0.1)
    model.train()
    for t in range(start + 1, start + steps + 1):
        optimizer.zero_grad()
        ((model(x).logits - target).square().mean() + gw.auxiliary_loss(model)).backward()
        optimizer.step()
        gw.step(model, t / total, optimizer)
    model.eval()


def test_diff_pruning__projection_keeps_the_largest_of_all():
    model = quiet()
    adapter = gw.graft(model, gw.DiffPruning(density=0.01), head=False)
    spread(adapter)
    before = [d.value(n).detach().clone() for d in adapter.deltas() for n in d.tensors()]
    one = list(adapter.deltas())[2]
    n = sum(map(size, adapter.sites))
    k = budget(None, 0.01, adapter.sites)
    assert k == int(0.01 * n)
    gw.step(model, 0.5)
    after = [d.value(n).detach() for d in adapter.deltas() for n in d.tensors()]
    flat, kept = torch.cat([b.flatten() for b in before]), torch.cat([a.flatten() for a in after])
    assert k - 2 < int((kept != 0).sum()) <= k
    assert torch.equal(kept[kept != 0], flat[kept != 0])  # from where they are
    assert flat[kept != 0].abs().min() >= flat[kept == 0].abs().max()
    shares = {float((d.value("change") != 0).float().mean()) for d in adapter.deltas()}
    assert len(shares) > 1  # not so many of each tensor
    assert adapter.num_parameters == k
    assert gw.auxiliary_loss(model) == 0.0
    # all the budget into one tensor
    model = quiet()
    adapter = gw.graft(model, gw.DiffPruning(density=0.01), head=False)
    spread(adapter)
    one = list(adapter.deltas())[2]
    one.change.data *= 1e4
    one.alpha["change"].data.fill_(5.0)
    one.group["change"].data.fill_(5.0)
    gw.step(model, 0.5)
    assert int((one.value("change") != 0).sum()) == min(k, one.change.numel())


def test_diff_pruning__the_mask_stays():
    model = quiet()
    adapter = gw.graft(model, gw.DiffPruning(density=0.01, dense=0.1), head=False)
    train(model, adapter, 6, 60)
    masks = [m.clone() for d in adapter.deltas() for m in d.masks.buffers()]
    values = [d.value(n).detach().clone() for d in adapter.deltas() for n in d.tensors()]
    assert sum(int(m.sum()) for m in masks) == budget(None, 0.01, adapter.sites)
    train(model, adapter, 50, 60, start=6)
    now = [d.value(n).detach() for d in adapter.deltas() for n in d.tensors()]
    for mask, before, after in zip(masks, values, now, strict=True):
        assert not after[~mask].any()
        assert not mask.any() or not torch.equal(before[mask], after[mask])
    assert all(map(torch.equal, masks, [m for d in adapter.deltas() for m in d.masks.buffers()]))


def test_diff_pruning__places_and_values_are_enough(tmp_path):
    model, x = quiet(), ids()
    adapter = gw.graft(model, gw.DiffPruning(density=0.01, dense=0.5), "a", head=False)
    train(model, adapter, 4, 6)
    gw.save(model, "a", tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert {name.rpartition("/")[2].split(".")[0] for name in stored} == {"index", "value"}
    k = budget(None, 0.01, adapter.sites)
    assert sum(t.numel() for t in stored.values() if t.is_floating_point()) == k
    out = model(x).logits
    gw.merge(model)
    again = quiet()
    loaded = gw.load(again, tmp_path / "a")
    assert torch.equal(again(x).logits, out)
    assert loaded.num_parameters == k
    gw.merge(again)
    mine, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(v, theirs[name]) for name, v in mine.items() if "graft" not in name)
    gw.unmerge(model)
    assert any(not torch.equal(v, mine[name]) for name, v in model.state_dict().items() if "graft" not in name)


def test_diff_pruning__rates_and_counts():
    method = gw.DiffPruning()
    adapter = gw.graft(quiet(), method, head=False)
    groups = sorted((group["lr"], len(group["params"])) for group in adapter.groups(1e-5))
    tensors = sum(len(d.tensors()) for d in adapter.deltas())
    assert groups == [(1e-5, tensors), (pytest.approx(0.1), 2 * tensors)]
    # BERT-large: 0.5% of all weights and biases of the backbone are kept
    model = bert_of("large")
    formula, made = counts(model, method)
    adapter = gw.graft(model, method, head=False)
    n = sum(map(size, adapter.sites))
    assert formula == made == 2 * n + sum(len(d.tensors()) for d in adapter.deltas())
    assert n == pytest.approx(335e6, rel=0.01)
    assert budget(None, method.density, adapter.sites) == int(0.005 * n)


def test_diff_pruning__impossible_gates_are_refused():
    for options in ({"low": 0.0}, {"low": 0.5}, {"high": 0.9}):
        with pytest.raises(gw.GraftError):
            gw.DiffPruning(**options)
