"""Learning rates where nobody gives one, and what is not evaluated twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import graftwork as gw
from graftwork.core.method import Method
from graftwork.train import DataSettings, FitSettings, TrainSettings, train
from graftwork.train.arguments import default_lr
from graftwork.train.trainer import split


def llama(width: int) -> nn.Module:
    with torch.device("meta"):
        return LlamaModel(LlamaConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=4, vocab_size=8))


@pytest.mark.parametrize(("width", "lr"), [(64, 2e-3), (384, 2e-3), (768, 1e-3), (4096, 2e-3 * 384 / 4096)])
def test_wide_backbones_are_trained_at_smaller_rates(width: int, lr: float) -> None:
    assert default_lr(llama(width)) == pytest.approx(lr)


def test_what_is_trained_whole_has_the_rate_of_full_tuning_and_its_head_that_of_heads() -> None:
    assert gw.Full(at="linear").lr == pytest.approx(5e-5) and gw.Full(at="head").lr == pytest.approx(1e-2)
    assert gw.Bottleneck(scale=4.0).lr == pytest.approx(1.25e-4) and gw.Bottleneck(scale=0.1).lr == Method.lr


def test_each_method_has_its_own_rate_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaModel(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=8))
    adapter = gw.graft(model, [gw.LoRA(r=2), gw.IA3()], "a")
    monkeypatch.setattr(gw.IA3, "lr", 5 * Method.lr)
    own = {id(p): g["lr"] for g in adapter.groups() for p in g["params"]}
    given = {id(p): g["lr"] for g in adapter.groups(0.1) for p in g["params"]}
    for part, rate in zip(adapter.parts, (Method.lr, 5 * Method.lr), strict=True):
        for delta in part.deltas.values():
            for p in delta.parameters():
                assert own[id(p)] == pytest.approx(rate) and given[id(p)] == 0.1
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    split(optimizer, adapter, own=True)
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([1e-3, 5e-3])
    plain = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    split(plain, adapter)
    assert [g["lr"] for g in plain.param_groups] == [1e-3]


@pytest.mark.parametrize("lr", [None, 1e-2])
def test_a_rate_that_is_given_holds_for_all(
    backbones: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float | None
) -> None:
    """With a rate of zero of its own, ia3 moves only if somebody gives one. One pass is evaluated once."""
    monkeypatch.setattr(gw.IA3, "lr", 0.0)
    tiny.write_csv(tmp_path / "rows.csv", tiny.feelings(64))
    result = train(
        TrainSettings(
            backbone=str(backbones("bert")),
            out=str(tmp_path / "out"),
            method="lora(r=2) + ia3",
            data=DataSettings(data=str(tmp_path / "rows.csv")),
            fit=FitSettings(epochs=1, lr=lr),
        )
    )
    lora, ia3 = result.adapter.parts[:2]
    assert any(delta.up.any() for delta in lora.deltas.values())
    moved = [not torch.equal(p, torch.ones_like(p)) for delta in ia3.deltas.values() for p in delta.parameters()]
    assert all(moved) if lr else not any(moved)
    assert sum("eval_accuracy" in entry for entry in result.history) == 1
    assert result.metrics["accuracy"] == result.history[-1].get("eval_accuracy", result.metrics["accuracy"])


def test_the_best_state_is_evaluated_again_where_it_is_not_the_last(
    backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny.write_csv(tmp_path / "rows.csv", tiny.feelings(200))
    fit = FitSettings(epochs=3, lr=0.5, best=True)  # so high that it gets worse
    result = train(
        TrainSettings(
            backbone=str(backbones("bert")),
            out=str(tmp_path / "out"),
            method="lora(r=2)",
            data=DataSettings(data=str(tmp_path / "rows.csv")),
            fit=fit,
        )
    )
    scores = [entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry]
    assert result.metrics["accuracy"] == max(scores)
