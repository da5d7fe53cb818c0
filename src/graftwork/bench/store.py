"""The runs in one SQLite file, on which any number of processes may work: what is claimed is claimed in a transaction.

A claim is a lease: its holder renews it while the run goes on. A run whose lease has passed was killed, and is claimed again; what
was killed a few times is a failure. (The write-ahead log needs a file system of one machine; several machines share `study`.)
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import GraftError
from .runs import DONE, FAILED, RUNNING, WAITING, Row, Run

FILE = "bench.sqlite"
TRIES = 3
SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL,
    task TEXT, label TEXT, text TEXT, parameters INTEGER, phase TEXT, lr REAL, seed INTEGER,
    state TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, worker TEXT, lease REAL,
    score REAL, seconds REAL, cpu REAL, memory INTEGER, bytes INTEGER, trained INTEGER, reason TEXT, result TEXT
);
"""
COLUMNS = ("task", "label", "text", "parameters", "phase", "lr", "seed")
RESULTS = ("score", "seconds", "cpu", "memory", "bytes", "trained", "reason")


class Store(Protocol):
    """Where runs are shared."""

    def agree(self, identity: Mapping[str, Any]) -> None: ...
    def add(self, runs: Sequence[Run]) -> None: ...
    def claim(self, worker: str, tasks: Collection[str]) -> Run | None: ...
    def renew(self, run: Run, worker: str) -> bool: ...
    def finish(self, run: Run, worker: str, result: Mapping[str, Any]) -> None: ...
    def release(self, run: Run, worker: str) -> None: ...
    def rows(self) -> list[Row]: ...


class SQLite:
    """A store in one file. lease: seconds for which a claim holds without being renewed."""

    def __init__(self, file: Path, lease: float) -> None:
        self.file, self.lease = file, lease
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as db:
                db.executescript("PRAGMA journal_mode=WAL;" + SCHEMA)
                db.execute("SELECT result FROM runs LIMIT 1")
        except (sqlite3.DatabaseError, OSError) as error:
            raise GraftError(f"the bench in {str(file)!r}", str(error), "give another --out") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each use: threads and processes share nothing but the file."""
        db = sqlite3.connect(self.file, timeout=60, isolation_level=None)
        try:
            yield db
        finally:
            db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise

    def agree(self, identity: Mapping[str, Any]) -> None:
        """Write down what decides the results, or GraftError where the file was begun with something else."""
        with self._writing() as db:
            there = {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM settings")}
            check_same(str(self.file), there, identity)
            given = [(name, json.dumps(value)) for name, value in identity.items()]
            db.executemany("INSERT OR IGNORE INTO settings VALUES (?, ?)", given)

    def add(self, runs: Sequence[Run]) -> None:
        """Put runs into the queue; those that are there stay as they are."""
        if runs:
            marks = ", ".join("?" * (len(COLUMNS) + 2))
            values = [(r.key, WAITING, *(getattr(r, c) for c in COLUMNS)) for r in runs]
            with self._writing() as db:
                db.executemany(
                    f"INSERT OR IGNORE INTO runs (key, state, {', '.join(COLUMNS)}) VALUES ({marks})", values
                )

    def claim(self, worker: str, tasks: Collection[str]) -> Run | None:
        """Take the next run of these tasks, first one whose holder has gone."""
        now, ours = time.time(), ", ".join("?" * len(tasks))
        with self._writing() as db:
            lost = f"killed {TRIES} times, or its machine went away"
            db.execute(
                "UPDATE runs SET state = ?, reason = ?, result = ? WHERE state = ? AND lease < ? AND tries >= ?",
                (FAILED, lost, json.dumps({"reason": lost}), RUNNING, now, TRIES),
            )
            found = db.execute(
                f"SELECT id, key FROM runs WHERE (state = ? OR (state = ? AND lease < ?)) AND task IN ({ours}) "
                "ORDER BY state, id LIMIT 1",
                (WAITING, RUNNING, now, *tasks),
            ).fetchone()
            if found is None:
                return None
            db.execute(
                "UPDATE runs SET state = ?, worker = ?, lease = ?, tries = tries + 1 WHERE id = ?",
                (RUNNING, worker, now + self.lease, found[0]),
            )
        return Run.from_key(found[1])

    def renew(self, run: Run, worker: str) -> bool:
        """A sign of life. False where somebody else has the run by now."""
        with self._writing() as db:
            done = db.execute(
                "UPDATE runs SET lease = ? WHERE key = ? AND worker = ? AND state = ?",
                (time.time() + self.lease, run.key, worker, RUNNING),
            )
            return done.rowcount == 1

    def finish(self, run: Run, worker: str, result: Mapping[str, Any]) -> None:
        """Write what came of a run, unless somebody else has it by now."""
        state = FAILED if "reason" in result else DONE
        given = ", ".join(f"{name} = ?" for name in RESULTS)
        with self._writing() as db:
            db.execute(
                f"UPDATE runs SET state = ?, result = ?, {given} WHERE key = ? AND worker = ? AND state = ?",
                (state, json.dumps(result), *(result.get(name) for name in RESULTS), run.key, worker, RUNNING),
            )

    def release(self, run: Run, worker: str) -> None:
        """Give a claimed run back: its worker was told to stop."""
        with self._writing() as db:
            db.execute(
                "UPDATE runs SET state = ?, tries = tries - 1 WHERE key = ? AND worker = ? AND state = ?",
                (WAITING, run.key, worker, RUNNING),
            )

    def write(self, rows: Sequence[Row]) -> None:
        """Take over rows that were shared elsewhere."""
        self.add([row.run for row in rows])
        given = ", ".join(f"{name} = ?" for name in RESULTS)
        with self._writing() as db:
            for row in rows:
                values = (row.state, json.dumps(dict(row.result)), *(row.result.get(name) for name in RESULTS))
                db.execute(f"UPDATE runs SET state = ?, result = ?, {given} WHERE key = ?", (*values, row.run.key))

    def rows(self) -> list[Row]:
        """Every run, in the order in which they were added."""
        with self._open() as db:
            found = db.execute("SELECT key, state, result FROM runs ORDER BY id").fetchall()
        return [Row(Run.from_key(key), state, json.loads(result) if result else {}) for key, state, result in found]


def check_same(place: str, there: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """GraftError where a bench was begun with other settings: it says which."""
    other = [f"{k} = {there[k]!r} there, {v!r} here" for k, v in identity.items() if k in there and there[k] != v]
    if other:
        do = "give the same settings, or another --out (--study)"
        raise GraftError(f"the bench in {place!r}", f"it was begun with other settings: {'; '.join(other)}", do)
