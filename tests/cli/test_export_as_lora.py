"""graftwork export --as-lora, and files of other formats through the commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForMaskedLM

import graftwork as gw
from graftwork.cli import main

INPUTS = {"input_ids": torch.tensor([[2, 7, 8, 9, 3]])}


@pytest.fixture(scope="module")
def adapter(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DoRA adapter that does something."""
    model = AutoModelForMaskedLM.from_pretrained(bert)
    made = gw.graft(model, "dora(r=2, at='q, v')", "a", head=False, seed=0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return gw.save(model, "a", tmp_path_factory.mktemp("a") / "a")


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def test_the_table_says_what_is_lost(
    adapter: Path, tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {}
    for rank in ("1", "4", "64"):
        out = tmp_path / rank
        assert main(["export", str(adapter), "--format", "peft", "--as-lora", "--rank", rank, "--out", str(out)]) == 0
        text = capsys.readouterr().out
        assert "relative error" in text and f"written to {out}" in text.replace("\n", "")
        errors[rank] = max(float(found) for found in re.findall(r"(\d\.\d+(?:e-\d+)?) [^\w]*$", text, re.M))
        assert json.loads((out / "adapter_config.json").read_text())["r"] <= int(rank)
    assert errors["1"] > errors["4"] > errors["64"] and errors["64"] < 1e-6
    theirs = peft.PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(bert), tmp_path / "64")
    ours = AutoModelForMaskedLM.from_pretrained(bert)
    gw.load(ours, adapter)
    assert (output(theirs) - output(ours)).abs().max() < 1e-4
    assert (output(ours) - output(AutoModelForMaskedLM.from_pretrained(bert))).abs().max() > 1e-2


def test_by_energy_into_one_file_and_back(
    adapter: Path, tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    assert main(["export", str(adapter), "--format", "kohya", "--as-lora", "--energy", "0.9", "--out", str(file)]) == 0
    assert file.is_file()
    assert main(["import", str(file), "--out", str(tmp_path / "own")]) == 2  # a file of kohya's names no backbone
    assert "--backbone" in capsys.readouterr().err
    assert main(["import", str(file), "--backbone", str(bert), "--out", str(tmp_path / "own")]) == 0
    first, second = (
        AutoModelForMaskedLM.from_pretrained(bert),
        AutoModelForMaskedLM.from_pretrained(bert),
    )
    gw.load(first, file)
    gw.load(second, tmp_path / "own")
    assert output(first).equal(output(second))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--format", "peft", "--rank", "2"], "--as-lora is not given"),
        (["--format", "peft", "--as-lora"], "--rank 16"),
        (["--format", "kohia", "--as-lora"], "did you mean 'kohya'"),
        (["--format", "pyreft"], "pyreft holds"),
    ],
)
def test_one_clear_error(
    options: list[str], word: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapter), *options, "--out", str(tmp_path / "out")]) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "out").exists()
