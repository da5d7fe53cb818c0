"""Two gloo processes on the CPU: DDP and FSDP2 reach the adapter of one process, and write one whole file."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from graftwork.train import DataSettings, FitSettings, TrainSettings, open_trained, train
from graftwork.train.run import chosen_split

STEPS = {"steps": 12, "lr": 5e-3, "evaluate_every": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    tiny.backbone("bert", folder / "bert")
    tiny.write_csv(folder / "rows.csv", tiny.feelings(160))
    data = DataSettings(str(folder / "rows.csv"), holdout=0.2)
    train(
        TrainSettings(
            str(folder / "bert"), str(folder / "one"), data, "lora(r=4)", name="it", fit=FitSettings(batch=8, **STEPS)
        )
    )
    return folder


def run(place: Path, out: str, *more: str) -> None:
    """The command line in two processes with half of the rows each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
        "-m",
        "graftwork.cli",
        "train",
        "--backbone",
        str(place / "bert"),
        "--data",
        str(place / "rows.csv"),
        "--holdout",
        "0.2",
        "--method",
        "lora(r=4)",
        "--name",
        "it",
        "--steps",
        "12",
        "--lr",
        "5e-3",
        "--evaluate-every",
        "6",
        "--batch",
        "4",
        "--out",
        str(place / out),
        *more,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]


def close(place: Path, out: str) -> None:
    one, two = (load_file(place / name / "adapter.safetensors") for name in ("one", out))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=0)


def test_ddp(place: Path) -> None:
    run(place, "ddp")
    close(place, "ddp")
    assert sorted(p.name for p in (place / "ddp").iterdir()) == ["README.md", "adapter.json", "adapter.safetensors"]


def test_fsdp2(place: Path) -> None:
    run(place, "fsdp", "--trainer", "fsdp=true", "--keep-checkpoints")
    close(place, "fsdp")
    checkpoint = place / "fsdp" / "checkpoints" / "checkpoint-6"
    assert (checkpoint / "optimizer.bin").is_file()  # FSDP's own form: it was FSDP that ran
    # an adapter trained in shards opens on one whole backbone
    data = chosen_split(str(place / "rows.csv"))
    assert open_trained(place / "fsdp").evaluate(data) == pytest.approx(
        open_trained(place / "one").evaluate(data), abs=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [(), ("--trainer", "fsdp=true")], ids=["ddp", "fsdp2"])
def test_going_on_from_a_checkpoint(place: Path, sharded: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    out = f"again-{request.node.callspec.id}"
    run(place, out, *sharded, "--best", "--keep-checkpoints")
    whole = load_file(place / out / "adapter.safetensors")
    shutil.rmtree(place / out / "checkpoints" / "checkpoint-12")
    for name in ("adapter.json", "adapter.safetensors", "README.md"):
        (place / out / name).unlink()
    run(place, out, *sharded, "--best", "--keep-checkpoints", "--resume")
    again = load_file(place / out / "adapter.safetensors")
    for key in whole:
        torch.testing.assert_close(again[key], whole[key], atol=1e-6, rtol=0)
