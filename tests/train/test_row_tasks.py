"""A column with the task of each row: methods that learn something for each task are told, in training and afterwards."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset

import graftwork as gw
from graftwork.cli import main
from graftwork.core.errors import GraftError
from graftwork.train import DataSettings, FitSettings, TrainSettings, open_trained, train


def contrary(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Feelings, which one of the two tasks labels the other way round: no adapter without a word of the task can learn both."""
    draw = random.Random(seed)
    other = {"positive": "negative", "negative": "positive"}
    rows = [{**row, "source": draw.choice(["plain", "turned"])} for row in tiny.feelings(count)]
    return [row | ({"label": other[row["label"]]} if row["source"] == "turned" else {}) for row in rows]


def settings(tmp_path: Path, method: str, out: str = "out", column: str | None = "source", **fit: Any) -> TrainSettings:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in contrary(600)))
    folder = tmp_path / "bert"
    if not folder.exists():
        tiny.backbone("bert", folder)
    return TrainSettings(
        backbone=str(folder),
        out=str(tmp_path / out),
        method=method,
        data=DataSettings(data=str(data), task_column=column, text="text", label="label"),
        fit=FitSettings(**{"epochs": 12, "lr": 2e-2, **fit}),
    )


# private skills, and learned allocations
METHODS = [
    "poly(r=1, skills=2, allocation=('10', '01'), tasks=('plain', 'turned'), at='linear')",
    "poly(r=2, skills=2, router_lr=30.0, at='linear')",
]


@pytest.mark.parametrize("method", METHODS)
def test_each_row_has_its_task_in_training_evaluation_and_prediction(method: str, tmp_path: Path) -> None:
    result = train(settings(tmp_path, method, checkpointing=True))
    assert result.adapter.methods[0].tasks == ("plain", "turned")  # type: ignore[attr-defined]
    assert result.metrics["accuracy"] > 0.9
    trained = open_trained(result.folder)
    assert trained.evaluate(Dataset.from_list(contrary(60, seed=3)))["accuracy"] > 0.9
    rows = [{"text": "the movie was awful", "source": name} for name in ("plain", "turned")]
    assert [a["label"] for a in trained.predict(rows)] == ["negative", "positive"]
    assert [a["label"] for row in rows for a in trained.predict([row])] == ["negative", "positive"]


def test_without_the_column_nothing_can_tell_them_apart(tmp_path: Path) -> None:
    result = train(settings(tmp_path, "lora(r=8, at='linear')", column=None, epochs=2))
    assert result.metrics["accuracy"] < 0.8


def test_the_router_has_its_own_learning_rate(tmp_path: Path) -> None:
    """Two speeds: with one of zero the allocations stay, and all else moves."""
    result = train(settings(tmp_path, "poly(r=2, skills=2, router_lr=0.0)", epochs=1))
    fresh = gw.graft(open_trained(result.folder).model, result.adapter.methods[0], "fresh", head=False, seed=0)
    trained, start = result.adapter.parts[0].tensors(), fresh.parts[0].tensors()
    assert trained.keys() == start.keys()
    for name, value in trained.items():
        assert torch.equal(value, start[name]) == name.endswith("logits"), name


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(settings(tmp_path, METHODS[0]))
    folder = str(result.folder)
    answers = []
    for name in ("plain", "turned"):
        assert main(["predict", folder, "the movie was awful", "--of-task", name]) == 0
        answers.append(json.loads(capsys.readouterr().out)["label"])
    assert answers == ["negative", "positive"]
    assert main(["merge", folder, "--out", str(tmp_path / "merged"), "--of-task", "turned"]) == 0
    capsys.readouterr()
    merged, trained = open_merged(tmp_path / "merged"), open_trained(folder)
    words = trained.processor(["the movie was awful"], return_tensors="pt")
    with torch.no_grad(), gw.context(trained.model, task="turned"):
        torch.testing.assert_close(merged(**words).logits, trained.model(**words).logits, atol=1e-4, rtol=1e-4)
    for command in (
        ["predict", folder, "bad"],
        ["predict", folder, "bad", "--of-task", "pla"],
        ["merge", folder, "--out", "m"],
    ):
        assert main(command) != 0
        assert "task" in capsys.readouterr().err
    assert not Path("m").exists()


def open_merged(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def test_what_does_not_fit_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    for method, column, found in (
        ("lora(r=2)", "source", "cannot tell rows of several tasks"),
        ("hyperformer()", "source", "cannot tell rows of several tasks"),
        ("poly(r=2) + hyperformer()", "source", "cannot tell rows of several tasks"),
        ("poly(r=2)", "sauce", "did you mean 'source'"),
        ("poly(r=2, tasks=('plain', 'other'))", "source", "the task 'turned'"),
        ("poly(r=2) + poly(tasks=('turned', 'plain'))", "source", "2 lists of tasks"),
    ):
        with pytest.raises(GraftError, match=found):
            train(settings(tmp_path, method, column=column))
        assert not (tmp_path / "out").exists()
