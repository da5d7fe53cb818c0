"""examples/compose.py runs from end to end on the real backbone, and prints what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(data: Path, minilm: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the words of one quick run."""
    out = tmp_path_factory.mktemp("compose")
    command = [sys.executable, str(ROOT / "examples" / "compose.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GRAFTWORK_DATA": str(data)})
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.fixture(scope="module")
def figures(run: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((run[0] / "figures.json").read_text(encoding="utf-8"))


def test_each_branch_is_to_the_bit_what_its_adapter_gives_alone(figures: dict[str, Any]) -> None:
    assert len(figures["at once"]) == 3
    for found in figures["at once"]:
        assert found["equal"] is True
        assert found["ms both"] > 0 and found["ms each"] > 0


def test_what_is_the_same_by_definition_scores_the_same(figures: dict[str, Any]) -> None:
    score = {way["expression"]: way["accuracy"] for way in figures["arithmetic"]["ways"]}
    # the sum of effects, and one LoRA that holds the sum of the changes: equal up to rounding, so to one row of the test
    assert score["cat"] == pytest.approx(score["0.5*one + 0.5*two"], abs=1.01 / figures["size"]["test"])
    assert figures["arithmetic"]["errors"]["cat"] < 1e-5
    at = dict(
        zip(figures["arithmetic"]["factors"], zip(*figures["arithmetic"]["curves"].values(), strict=True), strict=True)
    )
    assert at[1.0] == (score["one"],) * 3  # 1*one + 0*two
    assert at[0.0][:2] == (score["two"],) * 2


def test_the_weights_of_the_fusion_are_shares(figures: dict[str, Any]) -> None:
    weights = figures["fusion"]["weights"]
    assert list(weights) == ["complaint", "praise", "plot"]
    assert all(len(layers) == 6 and all(0 < w < 1 for w in layers) for layers in weights.values())
    assert len({tuple(layers) for layers in weights.values()}) == 3  # it looks at the tokens


def test_every_figure_of_the_tables_is_one_that_was_measured(run: tuple[Path, str], figures: dict[str, Any]) -> None:
    for way in figures["fusion"]["ways"]:
        assert f"| {way['way']} | {way['trained']:,} | {way['mean']:.3f} |" in run[1]
    for way in figures["arithmetic"]["ways"]:
        assert f"| `{way['expression']}` | {way['what']} | {way['accuracy']:.3f} |" in run[1]


def test_the_pictures_are_there(run: tuple[Path, str]) -> None:
    for name in ("factors.png", "fusion.png"):
        with Image.open(run[0] / name) as picture:
            low, high = picture.convert("L").getextrema()
            assert picture.width > 400 and low < 64 and high > 192
