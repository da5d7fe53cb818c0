"""Bad input to everything that works on adapters as values: one clear error, and the model as it was, to the bit."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.core.errors import GraftError

sys.path.insert(0, str(Path(__file__).parent.parent / "systems"))  # for its backbones
sys.path.insert(0, str(Path(__file__).parent.parent / "store"))  # for `look`

from adapter_models import bert, llama
from files import look
from value_models import change, keys, randomly, three


def library() -> nn.Module:
    """a, b, c: LoRAs of ranks 2, 5, 3 and two sets of sites; soft, soft5: bottlenecks; front: a prefix; "a" is active."""
    model = three()
    randomly(model, gw.Bottleneck(d=4), "soft", 4)
    randomly(model, gw.Bottleneck(d=5), "soft5", 5)
    randomly(model, gw.Prefix(length=2), "front", 6)
    gw.activate(model, "0.5*a + b")
    return model


Call = Callable[[nn.Module], Any]


def pairs(text: str, /, **calls: Call) -> list[Any]:
    return [pytest.param(call, text, id=f"{text[:24]}: {name}") for name, call in calls.items()]


def tuned(**changed: Any) -> dict[str, Any]:
    return {n: p.clone() for n, p in bert().state_dict().items()} | changed


UNKNOWN = pairs(
    "the adapter 'x'",
    activate=lambda m: gw.activate(m, "0.5*a + 0.5*x"),
    beside=lambda m: gw.activate(m, "a | x"),
    rows=lambda m: gw.activate(m, gw.rows(["a", "x", None])),
    remove=lambda m: gw.remove(m, "x"),
    save=lambda m: gw.save(m, "x", "/nowhere/x"),
    recipe=lambda m: gw.save(m, "a >> x", "/nowhere/x"),
    combine=lambda m: gw.combine(m, "new", {"a": 1.0, "x": 1.0}),
    expression=lambda m: gw.combine(m, "new", "a >> x"),
    average=lambda m: gw.average(m, "new", ["a", "x"]),
    arithmetic=lambda m: gw.arithmetic(m, "new", {"a": 1.0, "x": 1.0}),
    scale=lambda m: gw.scale(m, "new", "x", -1.0),
    subtract=lambda m: gw.subtract(m, "new", "a", "x"),
    similarity=lambda m: gw.similarity(m, "a", "x"),
    prototypes=lambda m: gw.prototypes(m, "x"),
    clusters=lambda m: gw.clusters(m, ["a", "x"], 1),
)
ACTIVATIONS = pairs(
    "changes activations, not a weight",
    combine=lambda m: gw.combine(m, "new", {"a": 1.0, "soft": 1.0}),
    svd=lambda m: gw.combine(m, "new", {"front": 1.0}, "svd", r=4),
    stack=lambda m: gw.combine(m, "new", "a >> front"),
    subtract=lambda m: gw.subtract(m, "new", "a", "soft"),
    similarity=lambda m: gw.similarity(m, "a", "soft"),
    prototypes=lambda m: gw.prototypes(m, "soft"),
)
UNEQUAL = [
    *pairs("is lora(", average=lambda m: gw.average(m, "new", ["a", "soft"])),
    *pairs(
        "'b' is lora(at='q, v, up', r=5",
        average=lambda m: gw.average(m, "new", ["a", "b"]),
        arithmetic=lambda m: gw.arithmetic(m, "new", {"a": 1.0, "b": 1.0}),
        clusters=lambda m: gw.clusters(m, ["a", "b"], 1),
    ),
    *pairs("run together, gw.activate", widths=lambda m: gw.average(m, "new", ["soft", "soft5"])),
    *pairs("a has r=2, b has r=5", linear=lambda m: gw.combine(m, "new", {"a": 1.0, "b": 1.0}, "linear")),
    *pairs("a has r=2, c has r=3", linear_b=lambda m: gw.combine(m, "new", {"a": 1.0, "c": 1.0}, "linear_b")),
]
NUMBERS = [
    case
    for number in (math.nan, math.inf, -math.inf, "0.5", None, True, 1j, 10**400, torch.tensor(0.5))
    for case in pairs(
        "give a finite number",
        **{
            f"combine {str(number)[:9]}": lambda m, w=number: gw.combine(m, "new", {"a": w, "b": 1.0}),
            f"average {str(number)[:9]}": lambda m, w=number: gw.average(m, "new", {"a": w}),
            f"arithmetic {str(number)[:9]}": lambda m, w=number: gw.arithmetic(m, "new", {"a": w}),
            f"scale {str(number)[:9]}": lambda m, w=number: gw.scale(m, "new", "a", w),
            f"subtract {str(number)[:9]}": lambda m, w=number: gw.subtract(m, "new", "a", "b", alpha=w),
        },
    )
]
FACTORS = [
    case
    for number in (math.nan, math.inf, "0.5", None, True, 1j)
    for case in pairs("no finite number", **{str(number): lambda m, w=number: gw.activate(m, w * gw.A("a"))})
]
EMPTY = [
    *pairs("no adapter", mean=lambda m: gw.activate(m, gw.mean())),
    *pairs(
        "expected the name of an adapter", text=lambda m: gw.activate(m, "mean()"), none=lambda m: gw.activate(m, "")
    ),
    *pairs("not a list of adapters", none=lambda m: gw.average(m, "new", []), text=lambda m: gw.average(m, "new", "a")),
    *pairs("not a list of adapters", numbers=lambda m: gw.average(m, "new", [1, 2])),
    *pairs(
        "no adapters with weights",
        average=lambda m: gw.average(m, "new", {}),
        combine=lambda m: gw.combine(m, "new", {}),
        arithmetic=lambda m: gw.arithmetic(m, "new", {}),
        unweighted=lambda m: gw.combine(m, "new", ["a", "b"]),
    ),
    *pairs("adds up to nothing", combine=lambda m: gw.combine(m, "new", "a - a")),
    *pairs("no row", rows=lambda m: gw.activate(m, gw.rows([]))),
]
EXTRACTION = [
    *pairs("the tuned one lacks", llama=lambda m: gw.extract(m, llama(), "new")),
    *pairs("the base lacks", deeper=lambda m: gw.extract(m, bert(layers=3), "new")),
    *pairs(
        "[3, 32] in the tuned one", head=lambda m: gw.extract(m, tuned(**{"classifier.weight": torch.zeros(3, 32)}))
    ),
    *pairs("not finite", nan=lambda m: gw.extract(m, tuned(**{"classifier.bias": torch.full((2,), math.nan)}))),
    *pairs("list, no tensor", list=lambda m: gw.extract(m, tuned(**{"classifier.bias": [0, 1]}))),
    *pairs("give the tuned model", path=lambda m: gw.extract(m, "tuned"), none=lambda m: gw.extract(m, None)),
    *pairs(
        "a whole number from 1 on",
        zero=lambda m: gw.extract(m, tuned(), r=0),
        text=lambda m: gw.extract(m, tuned(), r="16"),
        true=lambda m: gw.extract(m, tuned(), r=True),
        combine=lambda m: gw.combine(m, "new", {"a": 1.0}, "svd", r="16"),
        subtract=lambda m: gw.subtract(m, "new", "a", "b", r=2.5),
    ),
    *pairs("energy='0.9'", text=lambda m: gw.extract(m, tuned(), energy="0.9")),
    *pairs("energy=nan", combine=lambda m: gw.combine(m, "new", {"a": 1.0}, "svd", energy=math.nan)),
    *pairs("seed='1'", dare=lambda m: gw.combine(m, "new", {"a": 1.0}, "dare_ties", seed="1")),
    *pairs("no such rule", none=lambda m: gw.combine(m, "new", {"a": 1.0}, None)),
]


@pytest.mark.parametrize(("call", "said"), [*UNKNOWN, *ACTIVATIONS, *UNEQUAL, *NUMBERS, *FACTORS, *EMPTY, *EXTRACTION])
def test_it_is_refused_and_nothing_changes(call: Call, said: str) -> None:
    model = library()
    before = look(model)
    with pytest.raises(GraftError) as caught:
        call(model)
    assert said in str(caught.value)
    assert caught.value.asked and caught.value.found and caught.value.do
    assert look(model) == before
    assert gw.active(model) == "0.5*a + b"


@pytest.mark.parametrize("e", ["soft", "a >> front", "0.5*a + 0.5*soft"])
def test_a_merge_of_what_cannot_be_merged(e: str) -> None:
    model = library()
    gw.activate(model, e)
    before = look(model)
    with pytest.raises(GraftError, match="changes activations, not a weight") as caught:
        gw.merge(model)
    assert "unmerged" in caught.value.do
    assert look(model) == before


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", None, "b", "a"], ["a"] * 6])
def test_rows_of_the_wrong_length(names: list[str | None]) -> None:
    model = library()
    gw.activate(model, gw.rows(names))
    before = look(model)
    with pytest.raises(GraftError, match=f"a batch of 3 and {len(names)} names in rows") as caught, torch.no_grad():
        model(torch.zeros(3, 5, dtype=torch.long))
    assert caught.value.do
    assert look(model) == before
    gw.activate(model, "a")  # it goes on
    assert model(torch.zeros(3, 5, dtype=torch.long)).logits.isfinite().all()


def test_an_adapter_of_another_backbone(tmp_path: Path) -> None:
    gw.save(library(), "a", tmp_path / "a")
    gw.save(library(), "a >> soft", tmp_path / "r")
    other = bert()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    for model in (other, bert(layers=3), llama()):
        randomly(model, gw.LoRA(r=2), "own", 1)
        before = look(model)
        for folder in ("a", "r"):
            with pytest.raises(GraftError, match=r"other weights|another structure") as caught:
                gw.load(model, tmp_path / folder)
            assert "load the backbone" in caught.value.do
            assert look(model) == before


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers_of_other_kinds_are_numbers(number: Any, tmp_path: Path) -> None:
    model = library()
    for make in (gw.combine, gw.arithmetic):
        make(model, "one", {"a": number})
        make(model, "two", {"a": 0.5})
        for key in keys(model, "a"):
            assert torch.equal(change(model, "one", key), change(model, "two", key))
        gw.save(model, "one", tmp_path / make.__name__)
        gw.remove(model, "one"), gw.remove(model, "two")
