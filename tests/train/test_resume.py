"""A run that is killed or interrupted and then goes on ends, bit for bit, where an uninterrupted one does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from graftwork.core.errors import GraftError
from graftwork.train import DataSettings, FitSettings, TrainSettings, train
from graftwork.train.checkpoints import last_whole

# dropout everywhere: the random generators must come back too
METHOD = "lora(r=4, dropout=0.2)"
FIT = FitSettings(steps=160, batch=8, lr=5e-3, evaluate_every=20, accumulate=2, best=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    folder = tmp_path_factory.mktemp("resume")
    backbone = tiny.backbone("bert", folder / "bert", hidden_dropout_prob=0.2)
    data = tiny.write_csv(folder / "rows.csv", tiny.feelings(200))
    return TrainSettings(
        str(backbone), str(folder / "whole"), DataSettings(str(data), holdout=0.2), METHOD, name="it", fit=FIT
    )


@pytest.fixture(scope="module")
def whole(job: TrainSettings) -> dict[str, torch.Tensor]:
    """The adapter of the uninterrupted run."""
    train(job)
    return load_file(Path(job.out) / "adapter.safetensors")


def command(job: TrainSettings) -> list[str]:
    fit, data = job.fit, job.data
    given = {
        "backbone": job.backbone,
        "out": job.out,
        "data": data.data,
        "holdout": data.holdout,
        "method": job.method,
        "name": job.name,
        "steps": fit.steps,
        "batch": fit.batch,
        "lr": fit.lr,
        "evaluate-every": fit.evaluate_every,
        "accumulate": fit.accumulate,
    }
    return [
        sys.executable,
        "-m",
        "graftwork.cli",
        "train",
        "--best",
        *(x for k, v in given.items() for x in (f"--{k}", str(v))),
    ]


def stopped(job: TrainSettings, number: signal.Signals, after: str = "checkpoint-60") -> tuple[int, str]:
    """Run the job in a process of its own and send it a signal once a checkpoint is there. Returns exit code and
    messages."""
    process = subprocess.Popen(
        command(job),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 120
    while not (Path(job.out) / "checkpoints" / after / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def same(found: Path, whole: dict[str, torch.Tensor]) -> bool:
    tensors = load_file(found / "adapter.safetensors")
    return tensors.keys() == whole.keys() and all(torch.equal(tensors[k], whole[k]) for k in whole)


def test_after_a_kill(job: TrainSettings, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    job = replace(job, out=str(tmp_path / "killed"))
    code, _ = stopped(job, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "killed" / "adapter.json").exists()
    with pytest.raises(GraftError, match="--resume"):
        train(job)
    with pytest.raises(GraftError, match=r"fit\.lr = 0\.005, now it is 0\.1"):
        train(replace(job, resume=True, fit=replace(job.fit, lr=0.1)))
    # what a kill in the middle of a checkpoint leaves
    torn = tmp_path / "killed" / "checkpoints" / "checkpoint-150"
    shutil.copytree(last_whole(torn.parent, 1), torn)  # type: ignore[arg-type]
    (torn / "trainer_state.json").write_text('{"best_met')
    result = train(replace(job, resume=True))
    assert same(result.folder, whole)
    assert sorted(p.name for p in result.folder.iterdir()) == ["README.md", "adapter.json", "adapter.safetensors"]


def test_after_an_interrupt(job: TrainSettings, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    job = replace(job, out=str(tmp_path / "interrupted"))
    code, said = stopped(job, signal.SIGINT)
    assert code == 130 and "--resume" in said and "Traceback" not in said
    # the step at hand was finished and kept
    last = last_whole(tmp_path / "interrupted" / "checkpoints", 1)
    assert last is not None and int(last.name.split("-")[1]) >= 60
    # no backbone in a checkpoint
    assert sorted(p.name for p in (last / "adapter").iterdir()) == ["README.md", "adapter.json", "adapter.safetensors"]
    assert not [p for p in last.iterdir() if p.name in ("model.safetensors", "config.json", "training_args.bin")]
    result = train(replace(job, resume=True))
    assert same(result.folder, whole)


def test_resume_with_nothing_to_resume_begins(
    job: TrainSettings, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    result = train(replace(job, out=str(tmp_path / "new"), resume=True))
    assert same(result.folder, whole)
    before = tiny.tree(result.folder)
    with pytest.raises(GraftError, match="a finished adapter"):
        train(replace(job, out=str(tmp_path / "new"), resume=True))
    assert tiny.tree(result.folder) == before


def test_a_finished_run_can_be_replaced(job: TrainSettings, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "twice"
    train(replace(job, out=str(out), fit=replace(FIT, steps=2)))
    assert not same(out, whole)
    train(replace(job, out=str(out), overwrite=True))
    assert same(out, whole)


def test_early_stopping_keeps_the_best(job: TrainSettings, tmp_path: Path) -> None:
    fit = FitSettings(epochs=200, batch=8, lr=5e-2, evaluate_every=5, early_stopping=2)
    result = train(replace(job, out=str(tmp_path / "early"), fit=fit))
    evaluated = [h["eval_accuracy"] for h in result.history if "eval_accuracy" in h]
    assert len(evaluated) < 200 * 20 // 5
    assert result.metrics["accuracy"] == max(evaluated)
    assert max(evaluated[-2:]) <= max(evaluated[:-2])


def test_accumulation_is_the_mean_over_all_labels(job: TrainSettings, tmp_path: Path) -> None:
    """Four times eight rows move the adapter as 32 rows do (BERT accepts num_items_in_batch and ignores it)."""
    backbone = tiny.backbone("bert", tmp_path / "bert")
    for name, batch, accumulate in (("one", 32, 1), ("four", 8, 4)):
        fit = FitSettings(
            steps=5, batch=batch, accumulate=accumulate, lr=1e-2, trainer=("optim=sgd", "max_grad_norm=1000")
        )
        train(replace(job, backbone=str(backbone), out=str(tmp_path / name), method="lora(r=4)", fit=fit))
    one, four = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "four"))
    for key in one:
        torch.testing.assert_close(one[key], four[key], atol=1e-6, rtol=0)


def test_activation_checkpointing_changes_nothing(job: TrainSettings, tmp_path: Path) -> None:
    backbone = tiny.backbone("bert", tmp_path / "bert")
    for on in (False, True):
        fit = FitSettings(steps=5, lr=1e-2, checkpointing=on)
        train(replace(job, backbone=str(backbone), out=str(tmp_path / str(on)), method="lora(r=4)", fit=fit))
    plain, recomputed = (load_file(tmp_path / str(on) / "adapter.safetensors") for on in (False, True))
    for key in plain:
        torch.testing.assert_close(plain[key], recomputed[key], atol=1e-6, rtol=0)
