"""The bench itself: rows, entries, then workers that claim runs until none is left, and the report."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..core.errors import GraftError
from ..train.settings import DataSettings, FitSettings
from .child import job, main
from .chosen import Entry, Task, entries, labels, taken, task_of
from .runs import FINAL, OVER, Run, expected, missing
from .settings import BenchSettings
from .store import FILE, SQLite, Store
from .study import Study
from .tasks import BOTH, DEV, TEST, TRAIN, rows, sources

POLL = 0.2  # seconds
# each run is forked from a process that has imported everything and done nothing, which saves seconds; elsewhere a fresh one is made
PROCESSES: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
PROCESSES.set_forkserver_preload(["graftwork.bench.child"])
# rows of similar length share a batch: of SST-2 in batches of 16, cut at 40 tokens, 38% is padding otherwise
BY_LENGTH = ("train_sampling_strategy=group_by_length",)
Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]  # runs that are over, of so many, and what was the last


@dataclass(frozen=True)
class Plan:
    """What a bench consists of."""

    settings: BenchSettings
    tasks: tuple[Task, ...]
    entries: tuple[Entry, ...]


def plan(settings: BenchSettings, say: Say = lambda text: None) -> Plan:
    """Tasks and methods at their sizes. Every problem of the input is a GraftError here, before anything is trained."""
    chosen, asked = labels(settings), sources(settings)
    tasks, every = [], []
    for source in asked:
        task, model = task_of(rows(source, settings), settings, say)
        size = "no budget" if task.budget is None else f"{task.budget:,} trained beside the head"
        say(f"{task.name}: {task.metric}; backbone {task.backbone}, {task.parameters:,} parameters, {size}")
        every += entries(task, model, chosen)
        tasks.append(task)
    if not taken(every):
        raise GraftError(f"--methods {settings.methods!r}", "none can be run", f"first reason: {every[0].reason}")
    return Plan(settings, tuple(tasks), tuple(every))


def bench(settings: BenchSettings, say: Say = lambda text: None, progress: Progress = lambda n, of, last: None) -> Path:
    """Run what is missing, with `settings.workers` processes at a time, and write the report. Returns its page.

    KeyboardInterrupt ends the processes and gives their runs back; the same call goes on from there.
    """
    planned, local, store = _opened(settings, say)
    work = _Work(planned, store, progress)
    with ThreadPoolExecutor(settings.workers) as pool:
        workers = [pool.submit(work.until_done) for _ in range(settings.workers)]
        try:
            while wait(workers, timeout=1).not_done:
                work.tell()
        except BaseException:
            work.stopping.set()  # the workers give back what they have; leaving the block waits for them
            raise
    for worker in workers:
        worker.result()
    work.tell()
    return _reported(planned, local, store)


def written(settings: BenchSettings, say: Say = lambda text: None) -> Path:
    """Write the report of the runs that are over, without doing any. Returns its page. GraftError where there is no bench yet."""
    file = Path(settings.out).expanduser() / FILE
    if not file.is_file() and not settings.storage:
        raise GraftError(f"the report of {settings.out!r}", "no bench there", "run it first, without --report")
    return _reported(*_opened(settings, say))


def _opened(settings: BenchSettings, say: Say) -> tuple[Plan, SQLite, Store]:
    """The plan, the file below --out, and where the runs are shared: all agree on the settings."""
    file = Path(settings.out).expanduser() / FILE
    told = settings.identity() | {f"task {source.name}": source.place for source in sources(settings)}
    if file.is_file():  # what was begun is compared before anything else is done
        SQLite(file, settings.lease).agree(told)
    planned = plan(settings, say)
    local = SQLite(file, settings.lease)
    local.agree(told)
    if not settings.storage:
        return planned, local, local
    store = Study(settings.storage, settings.study, settings.lease)
    store.agree(settings.identity())  # a place is one machine's
    return planned, local, store


def _reported(planned: Plan, local: SQLite, store: Store) -> Path:
    rows = store.rows()
    if store is not local:
        local.write([row for row in rows if row.state in OVER])
    from .report import report

    return report(planned, rows, local.file.parent)


class _Work:
    """What the workers of one process share."""

    def __init__(self, planned: Plan, store: Store, progress: Progress) -> None:
        self.plan, self.store, self.progress = planned, store, progress
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.told = ""
        self.tasks = {task.name: task for task in planned.tasks}

    def until_done(self) -> None:
        """Claim and do one run after the other, until all are over, also those of other processes."""
        worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        try:
            while not self.stopping.is_set():
                with self.lock:
                    self.store.add(self._missing())
                    run = self.store.claim(worker, self.tasks)
                if run is not None:
                    self._do(run, worker)
                elif self._over():
                    return
                else:
                    self.stopping.wait(1)  # others' runs may still be lost, or open new ones
        except BaseException:
            self.stopping.set()
            raise

    def _missing(self) -> list[Run]:
        return missing(self.plan.tasks, self.plan.entries, self.plan.settings, self.store.rows())

    def _over(self) -> bool:
        ours = [row for row in self.store.rows() if row.run.task in self.tasks]
        return all(row.state in OVER for row in ours) and not self._missing()

    def tell(self) -> None:
        """Say how far it is."""
        there = self.store.rows()
        over = [row for row in there if row.state in OVER]
        self.progress(len(over), max(expected(self.plan.entries, self.plan.settings), len(there)), self.told)

    def _do(self, run: Run, worker: str) -> None:
        with tempfile.TemporaryDirectory(prefix="graftwork-bench-") as folder:
            result = self._watched(run, worker, Path(folder))
        if result is not None:
            with self.lock:
                self.store.finish(run, worker, result)
            said = f"{result['score']:.4g}" if "score" in result else result["reason"][:80]
            self.told = (
                f"{run.task} {run.label} lr {run.lr:g} {'dev' if run.phase != FINAL else f'seed {run.seed}'}: {said}"
            )

    def _watched(self, run: Run, worker: str, folder: Path) -> dict[str, Any] | None:
        """Do a run in a child process, renewing the claim. None where it was given back, or was taken for dead."""
        settings, told, log = self.plan.settings, folder / "job.json", folder / "log"
        told.write_text(json.dumps(job_of(self.plan, run, folder)), encoding="utf-8")
        limit = time.monotonic() + 60 * settings.timeout if settings.timeout else None
        child = PROCESSES.Process(target=main, args=(str(told), str(log)))
        with self.lock:  # starting one looks at all others, which two threads must not do at once
            child.start()
        renewed = time.monotonic()
        try:
            while self._runs(child):
                if self.stopping.wait(POLL):
                    raise KeyboardInterrupt
                if limit and time.monotonic() > limit:
                    return {"reason": f"ended after {settings.timeout:g} minutes (--timeout)"}
                if time.monotonic() - renewed > settings.lease / 4:
                    renewed = time.monotonic()
                    with self.lock:
                        if not self.store.renew(run, worker):
                            return None
        except KeyboardInterrupt:
            with self.lock:
                self.store.release(run, worker)
            return None
        finally:
            if self._runs(child):
                child.kill()
                while self._runs(child):
                    time.sleep(POLL)
        return _result(child.exitcode or 0, folder / "result.json", log)

    def _runs(self, child: BaseProcess) -> bool:
        with self.lock:
            return child.is_alive()


def job_of(planned: Plan, run: Run, folder: Path) -> dict[str, Any]:
    """What the process of a run is told: `child.run`. Files are written below `folder`."""
    task, settings = next(task for task in planned.tasks if task.name == run.task), planned.settings
    source, at = task.rows.source, task.rows.folder
    final = run.phase == FINAL
    data = DataSettings(
        str(at / (BOTH if final and source.refit else TRAIN)),
        str(at / (TEST if final else DEV)),
        text=source.text,
        pair=source.pair,
        label=source.label,
        max_length=settings.max_length,
    )
    told = BY_LENGTH if task.padded else ()
    fit = FitSettings(
        settings.epochs, settings.steps, settings.batch, precision=settings.precision, seed=run.seed, trainer=told
    )
    fit = replace(fit, lr_factor=run.lr) if settings.relative else replace(fit, lr=run.lr)
    return job(task.backbone, folder / "adapter", task.metric, run.text, data, fit, folder / "result.json")


def _result(status: int, file: Path, log: Path) -> dict[str, Any]:
    if status == 0 and file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    if status == -signal.SIGKILL:
        return {"reason": "out of memory: the system ended the process"}
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["nothing said"]
    return {"reason": f"failed with status {status}: {last[0][:300]}"}
