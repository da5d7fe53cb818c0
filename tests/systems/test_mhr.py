"""Caccia et al. 2023: Polytropon with a router for each head of the factors, and its ways of taking up a new task."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_models import bert, closed_form, ids, llama, spread
from peft import PolyConfig, get_peft_model
from torch import nn
from weight_models import dense

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("mhr")
TASKS = ("a", "b", "c")


def tiny(model=None, methods=(), **hyper):
    model = bert() if model is None else model
    method = gw.Poly(r=3, **({"tasks": TASKS, "skills": 4, "splits": 4} | hyper))
    adapter = gw.graft(model, [method, *methods], "m", head=False, seed=0)
    spread(adapter, 0.5)
    return model, adapter, adapter.parts[0]


def logits(model, task, x=None):
    with torch.no_grad(), gw.context(model, task=task):
        return model(ids() if x is None else x).logits


def update_by_hand(delta, t):
    """(A_t B_t)^T / r from the published formula, head by head."""
    z = delta.allocation.table[t].sigmoid()  # [splits, skills]
    w = z / (z.sum(-1, keepdim=True) + 1e-12)
    down = [sum(w[q, s] * delta.down[q, s].mT for s in range(w.shape[1])) for q in range(w.shape[0])]
    up = [sum(w[q, s] * delta.up[q, s].mT for s in range(w.shape[1])) for q in range(w.shape[0])]
    return (torch.cat(down) @ torch.cat(up, dim=1)).T / delta.down.shape[2]


def test_mhr__equals_a_loop_over_samples_with_merged_weights():
    model, _, part = tiny()
    x, tasks = ids(4), ["c", "a", "a", "b"]
    mixed = logits(model, tasks, x)
    base = bert()
    for i, task in enumerate(tasks):
        merged = copy.deepcopy(base)
        with torch.no_grad():
            for site in part.sites:
                update = update_by_hand(part.deltas[site.key], TASKS.index(task))
                merged.get_submodule(site.path).weight += update
                torch.testing.assert_close(
                    merged.get_submodule(site.path).weight, dense(model, site.key) + update, atol=1e-6, rtol=1e-6
                )
            torch.testing.assert_close(mixed[i : i + 1], merged(x[i : i + 1]).logits, atol=1e-5, rtol=1e-5)
    assert (mixed - base(x).logits).abs().max() > 1e-3


@pytest.mark.parametrize("splits", [1, 4])
def test_mhr__equals_the_peer_with_copied_tensors(splits):
    bare = llama()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = PolyConfig(r=3, n_tasks=3, n_skills=4, n_splits=splits, target_modules=targets, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(bare), config).eval()
    model, _, part = tiny(bare, splits=splits)
    tasks = torch.tensor([2, 0, 1, 0])
    with torch.no_grad():
        for site in part.sites:
            there, here = theirs.base_model.model.get_submodule(site.path), part.deltas[site.key]
            there.poly_lora_A["default"].copy_(here.down.mT)
            there.poly_lora_B["default"].copy_(here.up.mT)
            there.poly_router["default"].module_logits.copy_(here.router.logits.flatten(1))
        out = theirs(input_ids=ids(4), task_ids=tasks).logits
        torch.testing.assert_close(logits(model, tasks, ids(4)), out, atol=1e-5, rtol=1e-5)
        assert (out - llama()(ids(4)).logits).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_mhr__with_one_skill_the_router_is_ignored(training):
    model, adapter, _ = tiny(llama(), skills=1)
    model.double().train(training)
    with gw.context(model, task=["a", "b"]):
        model(ids()).logits.square().mean().backward()
    for delta in adapter.deltas():
        assert delta.router.logits.grad.abs().max() <= 1e-12
        assert delta.down.grad.any() and delta.up.grad.any()


def test_mhr__heads_are_independent():
    _, adapter, _ = tiny()
    delta = next(adapter.deltas())
    with torch.no_grad():
        down, up = delta.mixed(1)
        delta.router.logits[1, 0] += 1.0
        down_, up_ = delta.mixed(1)
    assert (down_ - down)[:, :8].abs().min(0).values.gt(0).all() and torch.equal(down_[:, 8:], down[:, 8:])
    assert (up_ - up)[:8].abs().max() > 1e-3 and torch.equal(up_[8:], up[8:])


def fitted(model, adapter, task, steps=3):
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        with gw.context(model, task=task):
            model(ids(4), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_mhr__z_trains_the_new_row_alone():
    model, old, _ = tiny()
    before = {name: t.clone() for name, t in old.state_dict().items()}
    wanted = {task: logits(model, task) for task in TASKS}
    new = gw.add_task(model, "z", "m", "d", tune="router")
    assert gw.active(model) == "z" and new.methods[0].tasks == (*TASKS, "d")
    sites = len(new.sites)
    assert new.num_parameters == closed_form(model, new.methods) == 4 * 4 * sites
    assert all(d.router.logits.abs().max() <= 1e-3 for d in new.deltas())
    start = {name: t.clone() for name, t in new.state_dict().items()}
    fitted(model, new, "d")
    for name, t in new.state_dict().items():
        assert torch.equal(t, start[name]) == (not name.endswith("logits")), name
    for task in TASKS:  # the old tasks are what they were
        assert torch.equal(logits(model, task), wanted[task])
    model.eval()
    assert torch.equal(logits(model, "d"), logits(model, "d"))
    gw.activate(model, "m")
    assert all(torch.equal(t, before[name]) for name, t in old.state_dict().items())


def test_mhr__seeds_matter_in_training_only():
    model, _, _ = tiny(llama())
    outputs = {}
    for training in (True, False):
        model.train(training)
        for seed in (1, 2):
            torch.manual_seed(seed)
            outputs[training, seed] = logits(model, ["a", "b"])
    assert (outputs[True, 1] - outputs[True, 2]).abs().max() > 1e-4
    assert torch.equal(outputs[False, 1], outputs[False, 2])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tune", ["all", "router"])
def test_mhr__a_new_task_beside_the_old_ones(shared, tune, tmp_path):
    model, old, part = tiny(shared=shared)
    wanted = {task: logits(model, task) for task in TASKS}
    new = gw.add_task(model, "n", "m", "d", tune=tune, start="mean")
    for task in TASKS:
        assert torch.equal(logits(model, task), wanted[task])
    for key, delta in new.parts[0].deltas.items():
        mean = part.deltas[key].allocation.table.mean(0)
        torch.testing.assert_close(delta.allocation.table[3], mean)
    fitted(model, new, "d")
    out = logits(model, "d")
    assert (out - wanted["a"]).abs().max() > 1e-5
    assert torch.equal(logits(model, "a"), wanted["a"]) == (tune == "router")
    gw.save(model, "n", tmp_path / "n")
    other = bert()
    loaded = gw.load(other, tmp_path / "n")
    assert torch.equal(logits(other, "d"), out) and loaded.methods == new.methods
    again = gw.add_task(other, "o", "n", "e", tune="router")  # of an adapter that is partly frozen already
    assert again.methods[0].frozen == 4 and torch.equal(logits(other, "d"), out)
    assert len(list(old.deltas())) == len(list(again.deltas()))


def test_mhr__mu_is_the_mean_of_the_skills_as_a_lora():
    model, _, part = tiny()
    for delta in part.deltas.values():
        delta.router.logits.data[1] = 0.7  # a task that takes all skills alike
    wanted = logits(model, "b")
    lora = gw.mean_skill(model, "mu", "m")
    assert [m.name for m in lora.methods] == ["lora"] and lora.trainable
    torch.testing.assert_close(logits(model, None), wanted, atol=1e-6, rtol=1e-5)
    for key, delta in lora.parts[0].deltas.items():
        torch.testing.assert_close(delta.down[:, :8], part.deltas[key].down[0].mean(0))
        torch.testing.assert_close(delta.up[8:16], part.deltas[key].up[1].mean(0))
    fitted(model, lora, None)
    assert (logits(model, None) - wanted).abs().max() > 1e-5


def test_mhr__a_head_comes_with_its_values():
    model, _, _ = tiny(methods=[gw.Full(at="head")])
    wanted = logits(model, "b")
    gw.add_task(model, "n", "m", "d")
    assert torch.equal(logits(model, "b"), wanted)
    assert [m.name for m in gw.mean_skill(model, "mu", "m").methods] == ["lora", "full"]


def test_mhr__bad_input_changes_nothing():
    model, _, _ = tiny()
    spread(gw.graft(model, gw.LoRA(r=2), "l", head=False))
    gw.graft(model, gw.Poly(skills=2, tasks=("a",), allocation=("11",)), "f", head=False)
    gw.activate(model, "m")
    before, wanted = list(gw.adapters(model)), logits(model, "a")
    for call, found in (
        (lambda: gw.add_task(model, "n", "m", "a"), "it has a, b, c"),
        (lambda: gw.add_task(model, "n", "l", "d"), "no skills"),
        (lambda: gw.add_task(model, "n", "f", "d"), "given, not learned"),
        (lambda: gw.add_task(model, "n", "m", "d", tune="z"), "tune='z'"),
        (lambda: gw.add_task(model, "l", "m", "d"), "has one"),
        (lambda: gw.mean_skill(model, "n", "l"), "no skills"),
        (lambda: gw.mean_skill(model, "n", "q"), "did you mean|has 'm'"),
    ):
        with pytest.raises(GraftError, match=found):
            call()
    assert list(gw.adapters(model)) == before and gw.active(model) == "m"
    assert torch.equal(logits(model, "a"), wanted)


def test_mhr__packed_and_transposed_weights():
    """Heads of a slice of a packed projection, and of transformers' Conv1D, row by row."""
    from weight_models import gpt2

    model, _, part = tiny(gpt2(), splits=2)
    x, tasks = ids(3), ["c", "a", "b"]
    mixed = logits(model, tasks, x)
    assert {site.rows for site in part.sites} > {None} or all(site.rows for site in part.sites if site.role in "qkv")
    for i, task in enumerate(tasks):
        torch.testing.assert_close(mixed[i : i + 1], logits(model, task, x[i : i + 1]), atol=1e-5, rtol=1e-5)
        with gw.context(model, task=task):
            gw.merge(model)
            torch.testing.assert_close(logits(model, None, x[i : i + 1]), mixed[i : i + 1], atol=1e-5, rtol=1e-5)
            gw.unmerge(model)
    assert isinstance(model, nn.Module)
