"""A whole bench on a tiny backbone: real processes, resumed, shared by two, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from graftwork.bench.chosen import labels
from graftwork.bench.runs import DONE, FAILED, FINAL, RUNNING, TUNE, WAITING, missing
from graftwork.bench.settings import BenchSettings
from graftwork.bench.store import FILE, SQLite
from graftwork.bench.work import bench, job_of, plan
from graftwork.cli import main
from graftwork.core.errors import GraftError
from graftwork.train.settings import flag


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feelings")
    for name, count in (("train", 64), ("dev", 20), ("test", 24)):
        tiny.write_csv(folder / f"{name}.csv", tiny.feelings(count, seed=count))
    return folder


def settings(bert: Path, data: Path, out: Path, **given) -> BenchSettings:
    told = {
        "tasks": f"feelings={data}",
        "methods": "lora",
        "budget": "1000",
        "lrs": "1e-2",
        "seeds": 2,
        "batch": 8,
    }
    return BenchSettings(**{"backbone": str(bert), "out": str(out), **told, **given})


@pytest.fixture(scope="module")
def finished(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchSettings, list]:
    """Two workers; one of the runs was claimed by a process that died."""
    out = tmp_path_factory.mktemp("bench") / "out"
    s = settings(bert, data, out, workers=2, lrs="1e-2,1e30")
    store = SQLite(out / FILE, lease=0.01)
    store.agree(s.identity())
    planned = plan(s)
    store.add(missing(planned.tasks, planned.entries, s, []))
    lost = store.claim("a process that died", {"feelings"})
    assert lost is not None
    told: list[tuple[int, int, str]] = []
    page = bench(s, progress=lambda over, of, last: told.append((over, of, last)))
    assert page.is_file() and told[-1][:2] == (4, 4)
    return s, SQLite(out / FILE, 60).rows()


def test_every_run_is_a_row_with_what_it_cost(finished) -> None:
    _, rows = finished
    finals = [row for row in rows if row.run.phase == FINAL]
    assert [row.run.seed for row in finals] == [0, 1] and all(row.state == DONE for row in finals)
    for row in finals:
        assert row.run.lr == 1e-2 and 0.0 <= row.result["score"] <= 1.0
        assert row.result["seconds"] > 0 and row.result["cpu"] > 0 and row.result["bytes"] > 0
        assert 100 * 2**20 < row.result["memory"] < 8 * 2**30
        # what was solved is what was trained, beside the head and the pooler that the checkpoint did not bring
        assert row.result["trained"] - row.run.parameters in (2 * 33, 2 * 33 + 32 * 33)
        assert (row.run.label, row.run.text) == ("lora", "lora(r=3)")


def test_a_run_that_diverges_is_a_row_and_is_not_chosen(finished) -> None:
    _, rows = finished
    wild = [row for row in rows if row.run.lr == 1e30]
    assert [(row.run.phase, row.state) for row in wild] == [(TUNE, FAILED)]
    assert "diverged" in wild[0].result["reason"]


def test_the_dead_processs_run_was_done_by_another(finished) -> None:
    s, _ = finished
    with sqlite3.connect(Path(s.out) / FILE) as db:
        tries = db.execute("SELECT state, tries FROM runs ORDER BY id").fetchall()
    assert tries[0] == (DONE, 2) and {n for _, n in tries[1:]} == {1}


def test_a_finished_bench_runs_nothing_again(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    s, rows = finished
    monkeypatch.setattr("graftwork.bench.work.PROCESSES", None)  # it would need one
    assert bench(s).is_file()
    assert SQLite(Path(s.out) / FILE, 60).rows() == rows


def test_the_report_of_the_runs_that_are_over(
    bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftwork.bench.work.PROCESSES", None)  # nothing is trained
    s = settings(bert, data, tmp_path / "out")
    assert main([*command_of(s), "--report"]) == 2 and "no bench there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    store, planned = SQLite(tmp_path / "out" / FILE, 60), plan(s)
    store.agree(s.identity())
    store.add(missing(planned.tasks, planned.entries, s, []))
    run = store.claim("someone", {"feelings"})
    assert run is not None
    cost = {"seconds": 2.0, "cpu": 1.0, "memory": 2**20, "bytes": 1000, "trained": 50, "device": "cpu"}
    store.finish(run, "someone", {"score": 0.875, "scores": {"accuracy": 0.875}, **cost})
    assert main([*command_of(s), "--report"]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "0.8750" in page and "1 runs, 0 of them failed; 1 to do" in page
    assert [row.state for row in store.rows()] == [DONE, WAITING]


def test_texts_of_similar_length_share_a_batch(bert: Path, data: Path, tmp_path: Path) -> None:
    planned = plan(settings(bert, data, tmp_path / "out"))
    [run, *_] = missing(planned.tasks, planned.entries, planned.settings, [])
    assert job_of(planned, run, tmp_path)["fit"]["trainer"] == ("train_sampling_strategy=group_by_length",)
    images = dataclasses.replace(planned, tasks=(dataclasses.replace(planned.tasks[0], padded=False),))
    assert job_of(images, run, tmp_path)["fit"]["trainer"] == ()


def test_ctrl_c_gives_the_runs_back(bert: Path, data: Path, tmp_path: Path) -> None:
    s = settings(bert, data, tmp_path / "out", epochs=1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "graftwork.cli", *command_of(s)],
        stderr=subprocess.PIPE,
        text=True,
        # a shell makes what it runs in the background ignore Ctrl-C, and so all that this starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    store = SQLite(tmp_path / "out" / FILE, 60)
    wait_for(lambda: any(row.state == RUNNING for row in store.rows()))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command goes on from there" in said
    assert [row.state for row in store.rows()] == [WAITING, WAITING]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna is not installed")
def test_two_machines_share_a_study(bert: Path, data: Path, tmp_path: Path) -> None:
    """Two processes with a folder each, which share nothing but the data base."""
    url = f"sqlite:///{tmp_path}/study.db"
    outs = [tmp_path / "here", tmp_path / "there"]
    commands = [command_of(settings(bert, data, out, storage=url)) for out in outs]
    processes = [subprocess.Popen([sys.executable, "-m", "graftwork.cli", *command]) for command in commands]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    here, there = (sorted(SQLite(out / FILE, 60).rows(), key=lambda row: row.run.seed) for out in outs)
    assert [row.state for row in here] == [DONE, DONE]
    assert here == there  # seconds and all: no run was done twice
    assert all((out / "index.html").is_file() for out in outs)


def command_of(s: BenchSettings) -> list[str]:
    out = ["bench"]
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        out += [] if value is None else [flag(field.name), str(value)]
    return out


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def test_other_settings_on_the_same_file_are_refused(finished, capsys: pytest.CaptureFixture[str]) -> None:
    s, _ = finished
    command = ["bench", "--backbone", s.backbone, "--tasks", str(s.tasks), "--out", s.out, "--epochs", "2"]
    assert main([*command, "--budget", "1000", "--lrs", s.lrs, "--batch", "8"]) == 2
    assert "epochs = 1.0 there, 2.0 here" in capsys.readouterr().err
    with pytest.raises(GraftError, match=r"task feelings = .* there, 'digits' here"):
        bench(dataclasses.replace(s, tasks="feelings=digits"))


def test_a_dry_run_lists_runs_with_sizes_and_trains_nothing(
    bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--backbone", str(bert), "--tasks", f"feelings={data}", "--out", str(tmp_path / "out")]
    assert main([*command, "--methods", "lora, bottleneck", "--budget", "5%", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "lora(r=" in said and "bottleneck(d=" in said and "12 runs" in said
    assert not (tmp_path / "out" / FILE).exists()


def test_help_says_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "(default: 0.5%)" in said
    assert all(flag(field.name) in said for field in dataclasses.fields(BenchSettings))


def test_a_budget_that_a_named_method_cannot_meet_is_an_error(
    bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "--backbone", str(bert), "--tasks", f"feelings={data}", "--out", str(tmp_path / "out")]
    assert main([*command, "--methods", "lora", "--budget", "100"]) == 2
    said = capsys.readouterr().err
    assert "lora(" in said and "within 100 parameters" in said and "its smallest setting has 256" in said
    assert not (tmp_path / "out" / FILE).exists()  # the next call may give another budget


def test_all_leaves_out_what_does_not_fit_and_says_why(bert: Path, data: Path, tmp_path: Path) -> None:
    s = settings(bert, data, tmp_path / "out", methods="all", budget="300")
    entries = {entry.label: entry for entry in plan(s).entries}
    assert set(entries) == set(labels(s))
    assert entries["lora"].text == "lora(r=1)" and entries["lora"].parameters == 256
    assert "other adapters" in entries["fusion"].reason and "smallest setting" in entries["abba"].reason
    assert entries["full"].parameters == 0  # the linear probe
    assert all(entry.parameters <= 300 for entry in entries.values())


def test_what_mixes_adapters_cannot_be_named(bert: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="other adapters"):
        plan(settings(bert, data, tmp_path / "out", methods="fusion(of=['a', 'b'])"))


def test_a_plugins_method_is_known_in_the_runs_own_process(bert: Path, data: Path, tmp_path: Path) -> None:
    plugin = Path(__file__).parents[2] / "examples" / "your_own_method.py"
    s = settings(bert, data, tmp_path / "out", methods="gain", seeds=1, steps=2, test_rows=4)
    command = [sys.executable, "-m", "graftwork.cli", "--plugin", str(plugin), *command_of(s)]
    assert subprocess.run(command).returncode == 0
    [row] = SQLite(tmp_path / "out" / FILE, 60).rows()
    assert row.state == DONE, row.result


def test_a_run_that_is_ended_by_the_system_is_a_row(tmp_path: Path) -> None:
    from graftwork.bench.work import _result

    (tmp_path / "log").write_text("Traceback\nValueError: what went wrong")
    assert "out of memory" in _result(-9, tmp_path / "none", tmp_path / "log")["reason"]
    assert (
        _result(1, tmp_path / "none", tmp_path / "log")["reason"] == "failed with status 1: ValueError: what went wrong"
    )


def test_the_digits_backbone_is_of_the_benchs_own(tmp_path: Path, bert: Path) -> None:
    import torch

    from graftwork.bench import digits
    from graftwork.bench.chosen import task_of
    from graftwork.bench.tasks import rows, sources
    from graftwork.train import DataSettings, FitSettings, TrainSettings, train

    s = settings(bert, tmp_path, tmp_path / "out", tasks="digits", train_rows=300, budget="0.5%")
    digit = rows(sources(s)[0], s)
    folder = digits.backbone(
        digit.folder, tmp_path / "out" / "backbones" / digit.folder.name, lambda text: None, epochs=1
    )
    task, model = task_of(digit, s, lambda text: None)  # finds what is there, and does not make it again
    assert task.backbone == str(folder) and task.metric == "accuracy" and 1.7e6 < task.parameters < 1.9e6
    assert not task.padded
    assert next(model.parameters()).device == torch.device("meta")
    data = DataSettings(str(digit.folder / "train.parquet"), str(digit.folder / "dev.parquet"))
    told = TrainSettings(
        task.backbone, str(tmp_path / "it"), data, method="lora(r=1)", fit=FitSettings(steps=2, batch=4)
    )
    assert 0 <= train(told).metrics["accuracy"] <= 1
    assert json.loads((folder / "config.json").read_text())["image_size"] == 8
