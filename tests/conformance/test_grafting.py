"""Grafting: refusals leave no trace, counts are the declared ones, copies are whole, global generators stay."""

from __future__ import annotations

import copy
import io
import random

import numpy as np
import pytest
import torch

import graftwork as gw
from graftwork.core.method import REGISTRY

from .cases import Snapshot, calibrate, every, first, grafted, leave_init, on, train
from .hosts import fresh, output
from .settings import CASES, REFUSED, SETTINGS, Case


def test_the_table_says_who_refuses_what():
    for name, settings in SETTINGS.items():
        assert name in REGISTRY, f"the table has a row for {name!r}, which is no method"
        for setting in settings:
            refused = {c.host.name for c in REFUSED if c.name == name and c.setting == setting}
            assert setting.refuses is None or refused == set(setting.refuses.split()), f"{name} {setting.label}"


@pytest.mark.parametrize("name", sorted(name for name, made in REGISTRY.items() if not made.mixes))
def test_every_method_sits_somewhere(name: str):
    assert [c for c in CASES if c.name == name]
    assert str(REGISTRY[name]()).startswith(name)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_refusal_says_why_and_leaves_the_model_alone(case: Case):
    model = fresh(case.host)
    before = Snapshot(model)
    with pytest.raises(gw.GraftError) as error:
        gw.graft(model, case.method, head=False)
    assert "found:" in str(error.value) and "do:" in str(error.value)
    before.same(model)


@on("linear_square", "bert")
def test_a_typo_in_one_of_several_targets_is_refused(case: Case):
    model = fresh(case.host)
    before = Snapshot(model)
    wrong = REGISTRY[case.name](**{**case.setting.options, "at": "linear, nope"})
    with pytest.raises(gw.GraftError, match="nope"):
        gw.graft(model, wrong, head=False)
    before.same(model)


@every
def test_count_is_the_declared_formula(case: Case):
    model, adapter = grafted(case)
    declared = 0
    for part in adapter.parts:
        declared += sum(part.method.count(site) for site in part.sites) + part.method.count_shared(part.sites)
    assert adapter.num_parameters == declared
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


@every
def test_deepcopy_is_whole_and_apart(case: Case):
    model, _adapter = grafted(case)
    inputs = case.host.inputs()
    before = output(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, inputs), before)
    there = gw.adapters(twin)["a"]
    assert {id(p) for p in there.parameters()} <= {id(p) for p in twin.parameters()}
    leave_init(there, seed=5)
    assert not torch.equal(output(twin, inputs), before)
    gw.remove(twin, "a")
    assert torch.equal(output(model, inputs), before)
    assert torch.equal(output(twin, inputs), output(fresh(case.host), inputs))


@first
def test_torch_save_and_pickle_keep_the_grafted_model(case: Case):
    model, _adapter = grafted(case)
    inputs = case.host.inputs()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(output(twin, inputs), output(model, inputs))
    assert type(twin).__qualname__ == type(fresh(case.host)).__qualname__
    gw.remove(twin, "a")
    Snapshot(fresh(case.host)).same_bits(twin)
    assert torch.equal(output(twin, inputs), output(fresh(case.host), inputs))


@every
def test_the_meta_device_allocates_nothing(case: Case):
    with torch.device("meta"):
        model = case.host.make()
    adapter = gw.graft(model, case.method, "a", head=False)
    tensors = [t for m in adapter.modules() for t in (*m.parameters(), *m.buffers())]
    assert tensors and all(t.is_meta or t.numel() == 1 for t in tensors)  # a counter has a value from the start
    _, real = grafted(case, noise=False)
    assert adapter.num_parameters == real.num_parameters


@every
def test_a_seed_decides_and_leaves_the_global_generators_alone(case: Case):
    model = fresh(case.host)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    one = gw.graft(model, case.method, "one", head=False, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.random.get_state()[1].tobytes() == states[2]
    torch.manual_seed(99)
    two = gw.graft(model, case.method, "two", head=False, seed=4).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@on("linear_square", "bert")
def test_names_are_data(case: Case):
    model = fresh(case.host)
    names = ["default", "1", "a.b", "q/v:0", "layer", 'ä "quoted" name', "..", "%2E"]
    outputs = {}
    for i, name in enumerate(names):
        leave_init(gw.graft(model, case.method, name, head=False, seed=i), seed=i)
    inputs = case.host.inputs()
    for name in names:
        gw.activate(model, str(gw.A(name)))
        outputs[name] = output(model, inputs)
    assert list(gw.adapters(model)) == names
    gw.remove(model, "1")
    for name in set(names) - {"1"}:
        gw.activate(model, gw.A(name))
        assert torch.equal(output(model, inputs), outputs[name])


@on("linear_square", "bert", "t5")
def test_a_copy_trains_like_its_original(case: Case):
    model, adapter = grafted(case, noise=False)
    calibrate(model, case)
    twin = copy.deepcopy(model)
    for m in (model, twin):
        train(m, gw.adapters(m)["a"], case.host.inputs(), range(2), 2)
    one, two = adapter.state_dict(), gw.adapters(twin)["a"].state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
