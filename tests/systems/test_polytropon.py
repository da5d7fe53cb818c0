"""Ponti et al. 2022: each task learns which skills of a common inventory of LoRAs it is made of."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bart_large, bert, closed_form, ids, llama, spread, t5
from peft import PolyConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import graftwork as gw
from graftwork.core.errors import GraftError
from graftwork.methods.weight.forms.allocation import log_prior

pytestmark = pytest.mark.system("polytropon")
TASKS = ("mnli", "sst2", "rte")


def tiny(model=None, std=0.5, **hyper):
    """A model with a Poly away from its start: (model, adapter, its part)."""
    model = bert() if model is None else model
    adapter = gw.graft(model, gw.Poly(r=3, **({"tasks": TASKS, "skills": 4} | hyper)), "p", head=False, seed=0)
    spread(adapter, std)
    return model, adapter, adapter.parts[0]


def one(skills=2, tasks=TASKS, d_in=6, d_out=10, **hyper):
    """A Poly on one rectangular Linear: (model, delta)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out)).eval()
    adapter = gw.graft(model, gw.Poly(r=2, skills=skills, tasks=tasks, at="linear", **hyper), "p", head=False)
    spread(adapter, 0.5)
    return model, next(adapter.deltas())


def logits(model, task, x=None):
    with torch.no_grad(), gw.context(model, task=task):
        return model(ids() if x is None else x).logits


def lora_of(model, part, name, pick):
    """A LoRA at the same sites with the factors pick(delta) -> (A [r, in], B [out, r])."""
    made = gw.graft(model, gw.LoRA(r=part.method.r, alpha=1.0, at=part.method.at), name, head=False)
    for key, delta in made.parts[0].deltas.items():
        down, up = pick(part.deltas[key])
        delta.down.data, delta.up.data = down.detach().clone(), up.detach().clone()
    return made


def test_polytropon__one_skill_is_a_lora_that_all_tasks_share():
    model, _, part = tiny(skills=1)
    outputs = [logits(model, task) for task in TASKS]
    base = (gw.activate(model, None), logits(model, None))[1]
    lora_of(model, part, "lora", lambda d: (d.down[0, 0], d.up[0, 0]))
    for out in outputs:
        torch.testing.assert_close(out, logits(model, None), atol=1e-6, rtol=1e-5)
        assert (out - base).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["large", "allocation"])
def test_polytropon__a_skill_for_each_task_is_private_loras(how):
    given = ("100", "010", "001") if how == "allocation" else ()
    model, adapter, part = tiny(skills=3, allocation=given)
    if how == "large":
        for delta in adapter.deltas():
            delta.router.logits.data = 200 * torch.eye(3)[:, None] - 100
    else:
        assert not any("logits" in name for name, _ in adapter.named_parameters())
    outputs = [logits(model, task) for task in TASKS]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    for t, task in enumerate(TASKS):
        lora_of(model, part, task, lambda d, t=t: (d.down[0, t], d.up[0, t]))
        torch.testing.assert_close(logits(model, None), outputs[t], atol=1e-6, rtol=1e-5)


def test_polytropon__training_draws_and_evaluation_does_not():
    model, adapter, _ = tiny()
    x = ids(3)
    assert torch.equal(logits(model, "sst2", x), logits(model, "sst2", x))
    model.train()
    model.config.hidden_dropout_prob = 0.0
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    same = x[:1].repeat(3, 1)
    drawn = logits(model, "sst2", same)
    assert not torch.equal(drawn, logits(model, "sst2", same))
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-6), "one draw is shared by the whole batch"
    model.eval()
    assert torch.allclose(*logits(model, "sst2", same)[:2], atol=1e-6)
    router = next(adapter.deltas()).router
    router.logits.data = torch.tensor([[[2.0, -1.0, 0.5, 0.0]]]).repeat(3, 1, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        w, exact = router(1, 40_000, torch.device("cpu")), router(1, None, torch.device("cpu"))
    torch.testing.assert_close(w.sum(-1), torch.ones(40_000, 1))
    torch.testing.assert_close(exact, (z := router.logits[1].sigmoid()) / z.sum(), atol=1e-6, rtol=1e-6)
    gap = (w.mean(0) - exact).abs().max().item()  # a mean of shares is not the share of means
    assert 0.005 < gap < 0.05


def test_polytropon__a_checkpointed_block_draws_the_same_again():
    gradients = []
    for again in (False, True):
        model, delta = one()
        model.train()
        x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(7)
        with gw.context(model, task="sst2"):
            out = checkpoint(model, x, use_reentrant=False) if again else model(x)
            out.square().sum().backward()
        gradients.append([p.grad for p in delta.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()


def test_polytropon__factors_are_mixed_and_then_multiplied():
    model, delta = one(skills=2)
    delta.router.logits.data.zero_()
    (a1, a2), (b1, b2) = delta.down[0], delta.up[0]
    x = torch.randn(3, 4, 6)
    base = F.linear(x, model[0]._parameters["weight"], model[0].bias)
    wanted = (b1 + b2) @ (a1 + a2) / 4 / 2
    with torch.no_grad(), gw.context(model, task="rte"):
        torch.testing.assert_close(model(x), base + F.linear(x, wanted), atol=1e-6, rtol=1e-5)
        average = (b1 @ a1 + b2 @ a2) / 2 / 2
        assert (F.linear(x, wanted) - F.linear(x, average)).abs().max() > 1e-2


@pytest.mark.parametrize("stochastic", [False, True])
def test_polytropon__rows_of_several_tasks_are_as_if_each_ran_alone(stochastic):
    model, adapter, _ = tiny(llama())
    x, tasks = ids(5), ["rte", "mnli", "mnli", "sst2", "rte"]
    mixed = logits(model, tasks, x)
    for i, task in enumerate(tasks):
        torch.testing.assert_close(mixed[i : i + 1], logits(model, task, x[i : i + 1]), atol=1e-5, rtol=1e-5)
    numbers = torch.tensor([TASKS.index(t) for t in tasks])
    assert torch.equal(logits(model, numbers, x), mixed)
    assert torch.equal(logits(model, numbers.tolist(), x), mixed)
    assert torch.equal(logits(model, numbers.to(torch.uint8), x), mixed)
    assert (mixed[0] - logits(model, "mnli", x)[0]).abs().max() > 1e-3
    if stochastic:  # gradients of Z reach the tasks of the batch only
        model.train()
        with gw.context(model, task=["mnli", "rte"]):
            model(x[:2]).logits.square().mean().backward()
        assert all(d.router.logits.grad[[0, 2]].any() for d in adapter.deltas())
        assert not any(d.router.logits.grad[1].any() for d in adapter.deltas())


@pytest.mark.parametrize("make", [llama, t5])
def test_polytropon__beams_have_the_task_of_their_row(make):
    model, _, _ = tiny(make(), std=1.0)
    x, tasks = ids(3), ["rte", "mnli", "sst2"]
    given = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with gw.context(model, task=tasks):
        together = model.generate(x, **given)
    alone = []
    for i, task in enumerate(tasks):
        with gw.context(model, task=task):
            alone.append(model.generate(x[i : i + 1], **given))
    assert torch.equal(together, torch.cat(alone))
    with gw.context(model, task=tasks[::-1]):
        assert not torch.equal(model.generate(x, **given), together)


def of_rows(*rows):
    """Logits [tasks, 1, skills] of a binary Z."""
    return (4.0 * torch.tensor(rows) - 2)[:, None].requires_grad_()


def test_polytropon__the_indian_buffet_prior_in_closed_form():
    log2 = math.log(2)
    for z, wanted in (
        (of_rows([1, 0], [1, 0], [1, 1]), 2 * log2),  # m = 3, 1: log 0! 2! + log 2! 0!
        (of_rows([1, 1], [1, 1], [0, 0]), -log2),  # m = 2, 2: log 1! 1! twice, less log 2! for one history
        (of_rows([1, 0], [1, 0], [1, 0]), log2),  # a skill that nobody uses is none
        (of_rows([1, 0], [0, 1], [0, 0]), 2 * log2),
    ):
        assert log_prior(z).item() == pytest.approx(wanted, abs=1e-5)
    z = of_rows([1, 0], [1, 0], [1, 1])
    log_prior(z).backward()
    p = z.detach().sigmoid()
    m = torch.tensor([3.0, 1.0])
    slope = torch.digamma(m) - torch.digamma(3 - m + 1)  # the same for every task: straight through
    torch.testing.assert_close(z.grad, (p * (1 - p) * slope), atol=1e-5, rtol=1e-5)
    assert slope[0] > 0 > slope[1]  # popular skills attract, rare ones repel


@pytest.mark.parametrize("shared", [False, True])
def test_polytropon__the_prior_is_subtracted_from_the_loss(shared):
    model, adapter, part = tiny(prior=0.5, shared=shared)
    routers = [part.shared_modules["router"]] if shared else [d.router for d in adapter.deltas()]
    wanted = -0.5 * sum(log_prior(r.logits) for r in routers)
    torch.testing.assert_close(gw.auxiliary_loss(model), wanted)
    assert gw.auxiliary_loss(tiny(shared=shared)[0]) == 0.0


def test_polytropon__oracle_of_bart_large():
    at = "self.q, self.k, self.v, self.o"
    for skills, tasks in ((1, 1), (8, 5)):
        method = gw.Poly(r=16, skills=skills, tasks=tuple(f"t{i}" for i in range(tasks)), at=at)
        assert closed_form(bart_large(), [method]) == (3_145_728 + 4 * 24 * tasks) * skills
    shared = gw.Poly(r=16, skills=8, tasks=TASKS, at=at, shared=True)
    assert closed_form(bart_large(), [shared]) == 8 * 3_145_728 + 3 * 8
    model, adapter, _ = tiny(shared=True)
    assert adapter.num_parameters == closed_form(model, adapter.methods)


def test_polytropon__equals_the_peer_in_both_modes():
    """HF PEFT's PolyModel with the same tensors and, in training, the same draws."""
    bare = llama()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = PolyConfig(r=3, n_tasks=3, n_skills=4, target_modules=targets, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(bare), config)
    model, _, part = tiny(bare)
    with torch.no_grad():
        for site in part.sites:
            there, here = theirs.base_model.model.get_submodule(site.path), part.deltas[site.key]
            there.poly_lora_A["default"].copy_(here.down.mT)
            there.poly_lora_B["default"].copy_(here.up.mT)
            there.poly_router["default"].module_logits.copy_(here.router.logits.flatten(1))
        for training in (False, True):
            model.train(training), theirs.train(training)
            outputs = []
            for run in (
                lambda: logits(model, torch.tensor([2, 0, 1, 0]), ids(4)),
                lambda: theirs(input_ids=ids(4), task_ids=torch.tensor([2, 0, 1, 0])).logits,
            ):
                torch.manual_seed(5)
                outputs.append(run())
            torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_polytropon__a_fixed_task_merges_and_is_a_plain_lora():
    model, _, _ = tiny()
    base = copy.deepcopy(model)
    wanted = {task: logits(model, task) for task in TASKS}
    for task in TASKS:
        with gw.context(model, task=task):
            gw.merge(model)
            torch.testing.assert_close(logits(model, None), wanted[task], atol=1e-5, rtol=1e-5)
            gw.unmerge(model)
            plain = gw.combine(model, f"{task} alone", {"p": 1.0})
        assert plain.adapter.methods[0].r == 3 and plain.error < 1e-6
        torch.testing.assert_close(logits(model, None), wanted[task], atol=1e-5, rtol=1e-5)
        gw.activate(model, "p")
    model.train()
    with gw.context(model, task="rte"):  # what is merged is never drawn
        gw.merge(model)
    torch.testing.assert_close(logits(model.eval(), None), wanted["rte"], atol=1e-5, rtol=1e-5)
    for task in (None, ["rte", "sst2"]):
        with gw.context(base, task=task), pytest.raises(GraftError, match="task"):
            gw.merge(base)
    torch.testing.assert_close(logits(base, "rte"), wanted["rte"])


def test_polytropon__sums_and_drops_keep_the_task_of_each_row():
    model, _, _ = tiny()
    spread(gw.graft(model, gw.LoRA(r=2, at="q, v"), "l", head=False))
    x, tasks = ids(3), ["rte", "sst2", "mnli"]
    for expression in ("0.5*p + 0.5*l", "l >> p", 'drop(p, layers="0")', "p - p"):
        gw.activate(model, expression)
        mixed = logits(model, tasks, x)
        for i, task in enumerate(tasks):
            torch.testing.assert_close(mixed[i : i + 1], logits(model, task, x[i : i + 1]), atol=1e-5, rtol=1e-5)
    gw.activate(model, gw.rows(["p", "l", None]))
    out = logits(model, "rte", x)
    for i, name in enumerate(("p", "l", None)):
        with gw.using(model, name):
            torch.testing.assert_close(out[i : i + 1], logits(model, "rte", x[i : i + 1]), atol=1e-5, rtol=1e-5)
    with pytest.raises(GraftError, match="adapter of its own"):
        logits(model, tasks, x)


def test_polytropon__inside_a_mixture_it_keeps_its_tasks_and_its_draws():
    model = llama()
    of = gw.Poly(r=2, skills=2, tasks=TASKS, at="q, v")
    spread(gw.graft(model, gw.Mixture(of=of, experts=2), "x", head=False), 0.5)
    x, tasks = ids(3), ["rte", "sst2", "mnli"]
    mixed = logits(model, tasks, x)
    for i, task in enumerate(tasks):
        torch.testing.assert_close(mixed[i : i + 1], logits(model, task, x[i : i + 1]), atol=1e-5, rtol=1e-5)
    model.train()
    assert not torch.equal(logits(model, "rte", x), logits(model, "rte", x))


@pytest.mark.parametrize("task", [["rte", "mnli"], torch.tensor([2, 0])], ids=str)
def test_polytropon__compiles_with_the_tasks_of_each_row(task):
    model, _, _ = tiny(llama(), splits=2)
    wanted = logits(model, task)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), gw.context(model, task=task):
        torch.testing.assert_close(compiled(ids()).logits, wanted, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_polytropon__two_speeds():
    _, adapter, _ = tiny(router_lr=100.0)
    groups = {group["lr"]: group["params"] for group in adapter.groups(1e-3)}
    assert set(groups) == {1e-3, 0.1}
    assert {id(p) for p in groups[0.1]} == {id(d.router.logits) for d in adapter.deltas()}
    assert sum(map(len, groups.values())) == len(list(adapter.parameters()))


def test_polytropon__bad_input_is_refused():
    for given, found in (
        ({"tasks": ("a", "a")}, "one twice"),
        ({"tasks": ()}, "no task"),
        ({"tasks": ("a",), "frozen": 1}, "none is left"),
        ({"tasks": ("a", "b"), "skills": 2, "allocation": ("10",)}, "no allocation"),
        ({"tasks": ("a",), "skills": 2, "allocation": ("00",)}, "no allocation"),
        ({"tasks": ("a",), "skills": 2, "allocation": ("12",)}, "no allocation"),
        ({"tasks": ("a",), "skills": 2, "allocation": ("11",), "shared": True}, "no shared"),
        ({"tau": 0.0}, "tau"),
    ):
        with pytest.raises(GraftError, match=found):
            gw.Poly(**given)
    model, _, _ = tiny()
    for task, found in (
        (None, "mnli"),
        ("mnlj", "did you mean 'mnli'"),
        (3, "the task 3"),
        (["rte", "sst3"], "did you mean 'sst2'"),
        (["rte", "sst2", "mnli"], "3 tasks for 2 rows"),
        (torch.tensor([0, -1]), "the task -1"),
        (torch.tensor([0, 3]), "the task 3"),
        (torch.tensor([0.0, 1.0]), "whole numbers"),
        (torch.tensor([False, True]), "whole numbers"),
    ):
        with pytest.raises(GraftError, match=found):
            logits(model, task)
    with pytest.raises(GraftError, match="heads do not divide"):
        one(splits=4)
