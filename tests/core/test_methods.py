"""Methods: hyper-parameters that check themselves, the registry, the text and JSON forms."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graftwork as gw
from graftwork.core.errors import GraftError
from graftwork.core.method import PRESETS, REGISTRY, from_json, method
from graftwork.core.text import parse_methods

gw.LoRA  # noqa: B018  (registers all methods)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_text_and_json_give_the_method_back(name: str) -> None:
    made = REGISTRY[name]()
    assert parse_methods(str(made)) == (made,)
    assert from_json(json.loads(json.dumps(made.to_json()))) == made


@given(
    st.integers(1, 999), st.floats(0.1, 99), st.sampled_from(["q", "q, v", "/x.*y/"]), st.sampled_from([None, "0-3,-1"])
)
def test_any_setting_survives_its_text(r: int, alpha: float, at: str, layers: str | None) -> None:
    made = gw.LoRA(r=r, alpha=alpha, at=at, layers=layers)
    assert parse_methods(str(made)) == (made,)
    assert from_json(json.loads(json.dumps(made.to_json()))) == made


def test_methods_join_with_plus() -> None:
    assert parse_methods("lora(r=4) + full") == (gw.LoRA(r=4), gw.Full())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gw.LoRA(rank=4), ["rank", "did you mean", "'r'"]),
        (lambda: gw.LoRA(r=0), ["r=0", ">= 1"]),
        (lambda: gw.LoRA(r="8"), ["'8'", "whole number"]),
        (lambda: gw.LoRA(r=True), ["whole number"]),
        (lambda: gw.LoRA(dropout=1.0), ["[0, 1)"]),
        (lambda: gw.LoRA(alpha=float("nan")), ["nan"]),
        (lambda: gw.Bottleneck(position="behind"), ["behind", "'after'"]),
        (lambda: parse_methods("lorra(r=4)"), ["lorra", "did you mean 'lora'"]),
        (lambda: parse_methods("lora(alhpa=4)"), ["alhpa", "did you mean 'alpha'"]),
        (lambda: parse_methods("lora(4)"), ["option=value"]),
        (lambda: parse_methods("lora(r=4"), ["lora(r=4", "^"]),
        (lambda: parse_methods("__import__('os')"), ["__import__"]),
        (lambda: parse_methods("lora(r=open('x'))"), ["open"]),
        (lambda: from_json({"r": 4}), ["'method'"]),
    ],
)
def test_bad_input_says_what_was_asked_found_and_to_do(make, words: list[str]) -> None:
    with pytest.raises(GraftError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_a_name_twice_is_an_error() -> None:
    with pytest.raises(GraftError, match="'lora'"):
        method("lora")(type("Other", (gw.Method,), {}))


def test_methods_are_listed_by_glob_and_flag() -> None:
    assert "lora" in gw.methods("*lora*", mergeable=True)
    assert "bottleneck" not in gw.methods(mergeable=True)
    assert set(gw.methods()) >= set(REGISTRY)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_takes_at_and_layers(name: str) -> None:
    made = PRESETS[name](at="q", layers="0")
    assert made[0].at == "q" and all(m.layers == ("0" if m.layered else None) for m in made)
    assert parse_methods(f"{name}(layers='0')") == tuple(PRESETS[name](layers="0"))
    with pytest.raises(GraftError, match="no hyper-parameter 'att'"):
        PRESETS[name](att="q")


RANKED = [(n, f.name) for n in sorted(REGISTRY) for f in fields(REGISTRY[n]) if f.metadata.get("rank")]


@pytest.mark.parametrize(("name", "option"), RANKED)
def test_a_rank_that_no_weight_has_is_refused(name: str, option: str) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(3, 2))
    before = {key: id(value) for key, value in model.named_parameters()}
    for too_large in (12, 1000):
        made = REGISTRY[name](**{option: too_large}, at="linear")
        for asked in (made, gw.LoRAPlus(of=made)):
            with pytest.raises(GraftError, match=r"=(12|16|1000), and none of the 2 weights there has a rank above 6"):
                gw.graft(model, asked, "a", head=False)
        assert {key: id(value) for key, value in model.named_parameters()} == before and not gw.adapters(model)


def test_small_weights_beside_large_ones_may_have_a_larger_rank() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(3, 2))
    assert gw.graft(model, gw.LoRA(r=6, at="linear"), "a", head=False).num_parameters == 6 * (18 + 15)
