"""Valipour et al. 2022: one LoRA for all ranks."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from adapter_models import bert, ids, llama, spread
from weight_models import counts, gpt2, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("dylora")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def lora_of(model, adapter, b, alpha):
    """The plain LoRA of the first b ranks, on a model of the same weights."""
    made = gw.graft(model, gw.LoRA(r=b, alpha=alpha), "plain", head=False)
    for mine, theirs in zip(made.deltas(), adapter.deltas(), strict=True):
        mine.down.data, mine.up.data = theirs.down.data[:b].clone(), theirs.up.data[:, :b].clone()
    return model


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_dylora__any_rank_equals_the_lora_of_the_first_ranks(make):
    model, x = make(), ids()
    adapter = gw.graft(model, gw.DyLoRA(r=5, alpha=7.0), "a", head=False)
    spread(adapter)
    with torch.no_grad():
        for b in range(1, 6):
            with gw.context(model, rank=b):
                out = model(x).logits
            close(out, lora_of(make(), adapter, b, 7.0)(x).logits)
        assert torch.equal(model(x).logits, out)  # without a word: the largest
    with gw.context(model, rank=6), pytest.raises(gw.GraftError, match="ranks 1 to 5"):
        model(x)


def test_dylora__a_rank_can_be_merged_and_cut_out():
    model, x = bert(), ids()
    spread(gw.graft(model, gw.DyLoRA(r=5), "a", head=False))
    with torch.no_grad(), gw.context(model, rank=2):
        out = model(x).logits
        gw.merge(model)
        close(model(x).logits, out)
        gw.unmerge(model)
        gw.combine(model, "cut", {"a": 1.0})
    with torch.no_grad():
        close(model(x).logits, out)
    assert {m.r for m in gw.adapters(model)["cut"].methods} == {2}


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora__what_the_draw_leaves_out_stays_to_the_bit(frozen):
    """With Adam's momentum and weight decay; in a step, and in the steps after it."""
    model, x = bert(), ids()
    method = gw.DyLoRA(r=4, frozen=frozen, seed=1)
    adapter = gw.graft(model, method, head=False)
    spread(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, weight_decay=0.1)
    model.train()
    for step in range(12):
        b = method.draw(step)
        before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
        for _ in range(1 + step % 2):  # gradients may come from several passes
            model(x, labels=torch.tensor([0, 1])).loss.backward()
        for delta in adapter.deltas():
            assert not delta.down.grad[b:].any() and not delta.up.grad[:, b:].any()
            assert delta.down.grad[b - 1].any() and delta.up.grad[:, b - 1].any()
        optimizer.step()
        gw.step(model, (step + 1) / 12)
        optimizer.zero_grad()
        for name, p in adapter.named_parameters():
            now, then = (p.detach(), before[name]) if name.endswith("down") else (p.detach().T, before[name].T)
            changed = [not torch.equal(r, s) for r, s in zip(now, then, strict=True)]
            assert changed == [(i == b - 1 if frozen else i < b) for i in range(4)]


def test_dylora__the_largest_rank_alone_is_lora_to_the_bit():
    one, two, x = bert(), bert(), ids()
    a = gw.graft(one, gw.DyLoRA(r=4, alpha=8.0, distribution=(0, 0, 0, 1)), head=False, seed=3)
    b = gw.graft(two, gw.LoRA(r=4, alpha=8.0), head=False, seed=3)
    for model, adapter in ((one, a), (two, b)):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        model.train()
        for step in range(4):
            model(x, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
            gw.step(model, (step + 1) / 4)
            optimizer.zero_grad()
    for mine, theirs in zip(a.deltas(), b.deltas(), strict=True):
        assert torch.equal(mine.down, theirs.down) and torch.equal(mine.up, theirs.up)
        assert theirs.up.any()


def test_dylora__one_draw_for_all_layers_and_all_ranks_alike():
    method = gw.DyLoRA(r=8, seed=2)
    seen = Counter(method.draw(step) for step in range(1000))
    assert sorted(seen) == list(range(1, 9))
    assert all(85 < n < 165 for n in seen.values())  # 125 expected, four standard deviations
    model = bert().train()
    adapter = gw.graft(model, method, head=False)
    drawn = []
    for step in range(6):
        model(ids())
        drawn.append({delta.drawn for delta in adapter.deltas()})
        gw.step(model, step / 6)
    assert drawn == [{method.draw(step)} for step in range(6)]
    assert len({min(d) for d in drawn}) > 1


def test_dylora__another_process_and_a_resumed_run_draw_the_same(tmp_path):
    model = bert().train()
    adapter = gw.graft(model, gw.DyLoRA(r=8), "a", head=False)
    twin = copy.deepcopy(model)
    for m in (model, twin):
        torch.manual_seed(id(m) % 1000)  # of no importance
        for step in range(3):
            m(ids())
            gw.step(m, step / 9)
    gw.save(model, "a", tmp_path, resume=True)
    again = bert().train()
    gw.load(again, tmp_path, "a", trainable=True)
    for m in (model, twin, again):
        m(ids())
    drawn = [next(gw.adapters(m)["a"].deltas()).drawn for m in (model, twin, again)]
    assert drawn == [adapter.methods[0].draw(3)] * 3


def test_dylora__one_that_is_not_trained_has_all_its_ranks():
    model = bert().train()
    spread(gw.graft(model, gw.DyLoRA(r=8), "a", head=False))
    model(ids())
    gw.adapters(model)["a"].trainable = False
    gw.graft(model, gw.LoRA(), "b", head=False)
    gw.activate(model, "a >> b")
    steps = gw.adapters(model)["a"].state_dict()["0/shared/schedule.steps"].item()
    for _ in range(3):
        model(ids())
        gw.step(model, 0.5)
    assert {delta.rank for delta in gw.adapters(model)["a"].deltas()} == {8}
    assert gw.adapters(model)["a"].state_dict()["0/shared/schedule.steps"].item() == steps


def test_dylora__counts():
    assert counts(roberta_of("base"), gw.DyLoRA(r=8)) == (294_912, 294_912)
    with pytest.raises(gw.GraftError, match="3 numbers"):
        gw.DyLoRA(r=4, distribution=(1, 1, 1))
    for wrong in ((0, 0, 0, 0), (1, -1, 1, 1), (1, 1, 1, float("nan"))):
        with pytest.raises(gw.GraftError, match="numbers >= 0"):
            gw.DyLoRA(r=4, distribution=wrong)
