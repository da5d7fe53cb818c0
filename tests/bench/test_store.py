"""Many workers on one bench: SQLite's file and optuna's study keep the same promises."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from graftwork.bench.runs import DONE, FAILED, RUNNING, WAITING, Run
from graftwork.bench.store import FILE, TRIES, SQLite
from graftwork.bench.study import Study
from graftwork.core.errors import GraftError

RUN = Run("sst2", "lora", "lora(r=2)", 512, "final", 1e-3, 0)
RUNS = [replace(RUN, seed=seed) for seed in range(6)]
GOOD = {"score": 0.5, "seconds": 1.0, "cpu": 1.0, "memory": 1, "bytes": 1, "trained": 1, "scores": {"accuracy": 0.5}}
OPTUNA = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna is not installed")
TASKS = {"sst2"}


@pytest.fixture(params=["sqlite", pytest.param("optuna", marks=OPTUNA)])
def open_store(request: pytest.FixtureRequest, tmp_path: Path):
    """Opens the same store again and again."""

    def make(lease: float = 60.0):
        if request.param == "sqlite":
            return SQLite(tmp_path / FILE, lease)
        return Study(f"sqlite:///{tmp_path}/study.db", "it", lease)

    return make


def test_every_run_goes_to_one_worker(open_store) -> None:
    open_store().add(RUNS)
    taken: list[Run] = []

    def work(name: str) -> None:
        store = open_store()
        while (run := store.claim(name, TASKS)) is not None:
            taken.append(run)
            store.finish(run, name, GOOD)

    threads = [threading.Thread(target=work, args=(f"worker {i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if isinstance(open_store(), SQLite):
        assert sorted(taken, key=lambda r: r.seed) == RUNS
    assert set(taken) == set(
        RUNS
    )  # optuna needs a data base that locks rows to hand each to one: its own file does not
    rows = open_store().rows()
    assert [row.state for row in rows] == [DONE] * 6 and all(row.result["score"] == 0.5 for row in rows)


def test_what_is_there_is_not_added_again(open_store) -> None:
    store = open_store()
    store.add(RUNS[:2])
    store.claim("a", TASKS)
    store.add(RUNS)
    assert [row.state for row in store.rows()] == [RUNNING] + [WAITING] * 5


def test_a_failure_is_a_row_with_its_reason(open_store) -> None:
    store = open_store()
    store.add([RUN])
    store.finish(store.claim("a", TASKS), "a", {"reason": "diverged: the loss is nan at step 3"})
    [row] = open_store().rows()
    assert (row.state, row.result["reason"]) == (FAILED, "diverged: the loss is nan at step 3")
    assert store.claim("a", TASKS) is None


def test_the_run_of_a_worker_that_was_killed_is_taken_again(open_store, tmp_path: Path) -> None:
    store = open_store(lease=2)
    store.add([RUN])
    assert store.claim("dead", TASKS) == RUN
    other = open_store(lease=2)
    assert other.claim("alive", TASKS) is None  # its lease holds
    time.sleep(3.5)
    assert other.claim("alive", TASKS) == RUN
    store.finish(RUN, "dead", {"reason": "too late"})  # nobody listens to the dead
    other.finish(RUN, "alive", GOOD)
    assert [(row.state, row.result.get("score")) for row in open_store(lease=2).rows()] == [(DONE, 0.5)]


def test_a_sign_of_life_keeps_a_run(open_store) -> None:
    store = open_store(lease=2)
    store.add([RUN])
    store.claim("alive", TASKS)
    for _ in range(4):
        time.sleep(1)
        assert store.renew(RUN, "alive")
    assert open_store(lease=2).claim("other", TASKS) is None


def test_what_is_killed_again_and_again_fails(tmp_path: Path) -> None:
    store = SQLite(tmp_path / FILE, lease=0.01)
    store.add([RUN])
    for i in range(TRIES):
        assert store.claim(f"worker {i}", TASKS) == RUN
        time.sleep(0.05)
    assert store.claim("one more", TASKS) is None
    assert store.rows()[0].state == FAILED and "killed 3 times" in store.rows()[0].result["reason"]


def test_a_run_that_is_given_back_waits_again(open_store) -> None:
    store = open_store()
    store.add([RUN])
    store.release(store.claim("a", TASKS), "a")
    assert [row.state for row in store.rows()] == [WAITING]
    assert open_store().claim("b", TASKS) == RUN


def test_runs_of_other_tasks_are_left_to_others(open_store) -> None:
    store = open_store()
    store.add([RUN])
    assert store.claim("a", {"subj"}) is None
    assert [row.state for row in store.rows()] == [WAITING]


def test_settings_that_differ_are_refused_by_name(open_store) -> None:
    open_store().agree({"backbone": "b", "budget": "0.5%", "epochs": 1.0})
    open_store().agree({"backbone": "b", "budget": "0.5%", "epochs": 1.0})
    with pytest.raises(GraftError, match=r"budget = '0.5%' there, '1%' here; epochs = 1.0 there, 2.0 here"):
        open_store().agree({"backbone": "b", "budget": "1%", "epochs": 2.0})


def test_a_process_that_is_killed_in_a_transaction_leaves_the_file_whole(tmp_path: Path) -> None:
    SQLite(tmp_path / FILE, 60).add(RUNS)
    code = f"""
import os, sqlite3
db = sqlite3.connect({str(tmp_path / FILE)!r}, isolation_level=None)
db.execute("BEGIN IMMEDIATE")
db.execute("UPDATE runs SET state = 'running', worker = 'x', lease = 1e12")
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    store = SQLite(tmp_path / FILE, 60)
    assert [row.state for row in store.rows()] == [WAITING] * 6
    assert store.claim("a", TASKS) == RUNS[0]


def test_a_file_that_is_no_bench_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("this is no data base, though it is long enough to be looked at" * 20)
    with pytest.raises(GraftError, match="not a database"):
        SQLite(tmp_path / FILE, 60)


@OPTUNA
def test_a_data_base_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(GraftError, match="can be reached"):
        Study("sqlite:////nowhere/at/all.db", "it", 60)
