"""Adapted weights that are kept between inference passes: made once, never stale, freed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.core.delta import WeightDelta
from graftwork.core.plan import Plan

METHODS = {
    "dora": lambda: gw.DoRA(r=2, at="linear"),
    "vera": lambda: gw.VeRA(r=8, at="linear"),
    "lora on a convolution": lambda: gw.LoRA(r=2, at="conv"),
}


def model_for(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if "convolution" in name:
        return nn.Sequential(nn.Conv1d(6, 4, 3), nn.Flatten()).eval(), torch.randn(2, 6, 5)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2)).eval(), torch.randn(2, 6)


def grafted(name: str) -> tuple[nn.Module, gw.Adapter, Tensor, Plan]:
    model, x = model_for(name)
    adapter = gw.graft(model, METHODS[name](), head=False)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    plan = model[0]._armed.plan
    assert plan.keeps
    return model, adapter, x, plan


def made(call: Callable[[], object]) -> int:
    """How often an adapted parameter is computed."""
    with patch.object(Plan, "adapted", autospec=True, side_effect=Plan.adapted) as counted:
        call()
    return counted.call_count


@pytest.mark.parametrize("name", METHODS)
def test_made_once_and_equal_to_the_pass_that_trains(name: str) -> None:
    model, _, x, _ = grafted(name)
    expected = model(x).detach()
    with torch.no_grad():
        first = made(lambda: torch.testing.assert_close(model(x), expected))
        assert first > 0
        assert made(lambda: torch.testing.assert_close(model(x), expected)) == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_write_to_anything_it_is_made_of_makes_it_again(name: str) -> None:
    model, adapter, x, _ = grafted(name)
    tensors = [*adapter.parameters(), model[0].weight]
    with torch.no_grad():
        for t in tensors:
            before = model(x)
            t.mul_(1.5)
            after = model(x)
            gw.keep_weights(model, False)
            torch.testing.assert_close(after, model(x))
            gw.keep_weights(model, True)
            assert not torch.allclose(before, after)
        optimiser = torch.optim.SGD(adapter.parameters(), lr=0.5)
    before = model(x)
    before.sum().backward()
    optimiser.step()
    with torch.no_grad():
        after = model(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(x).detach())


@pytest.mark.parametrize("name", METHODS)
def test_training_activation_and_the_switch_free_it(name: str) -> None:
    model, _, x, plan = grafted(name)

    def fill() -> None:
        with torch.no_grad():
            model(x)
        assert plan._kept

    fill()
    model(x)
    assert not plan._kept
    fill()
    gw.keep_weights(model, False)
    assert not plan._kept
    with torch.no_grad():
        model(x)
    assert not plan._kept
    gw.keep_weights(model)
    fill()
    assert not copy.deepcopy(model)[0]._armed.plan._kept
    gw.activate(model, None)
    assert "_armed" not in model[0].__dict__


def test_dropout_in_training_mode_is_not_lost_without_gradients() -> None:
    model, x = model_for("dora")
    adapter = gw.graft(model, gw.DoRA(r=2, dropout=0.5, at="linear"), head=False)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
        model(x)
        model.train()
        assert not torch.equal(model(x), model(x))


def test_lora_on_linear_layers_keeps_nothing() -> None:
    model, x = model_for("lora")
    gw.graft(model, gw.LoRA(r=6, at="linear"), head=False)
    with torch.no_grad():
        model(x)
    assert not model[0]._armed.plan.keeps
    assert not model[0]._armed.plan._kept


def test_a_delta_that_depends_on_the_pass_is_never_kept() -> None:
    assert not WeightDelta.lasting  # a new method says so itself
