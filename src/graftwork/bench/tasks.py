"""From a task's name to fixed rows: train, dev and test are chosen once, written below --out, and shared by all runs.

The tuning sees dev rows only; test rows are scored by the runs that count and by no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from ..core.errors import GraftError, nearest
from ..train.data import read
from .settings import BenchSettings
from .suites import Source, suite

TRAIN, DEV, TEST, BOTH = "train.parquet", "dev.parquet", "test.parquet", "train+dev.parquet"
ROWS = 2000  # to learn from, where neither the settings nor a suite says
HELD = {"dev": 0.1, "test": 0.2}  # shares of the training rows where the source has no such split
NAMED = ("sst2", "subj", "digits")


@dataclass(frozen=True)
class Rows:
    """A task whose rows are written. folder: of the four files."""

    source: Source
    folder: Path

    @property
    def name(self) -> str:
        return self.source.name


def sources(settings: BenchSettings) -> list[Source]:
    """The tasks that are asked for. GraftError for an unknown one, with the nearest name."""
    known = (
        {s.name: s for s in suite(settings.suite)}
        if settings.suite
        else {name: _named(name, settings) for name in NAMED}
    )
    if settings.tasks is None:
        return list(known.values())
    chosen: dict[str, Source] = {}
    for text in filter(None, (part.strip() for part in settings.tasks.split(","))):
        name, sign, place = text.partition("=")
        if not sign and name not in known:
            do = f"choose among {', '.join(known)}, or write NAME=PATH"
            raise GraftError(f"the task {name!r}", f"unknown{nearest(name, known)}", do)
        if not re.fullmatch(r"[\w.-]+", name) or name in chosen:
            raise GraftError(
                f"the task {text!r}", "twice" if name in chosen else "not a name", "name each task once: NAME=PATH"
            )
        chosen[name] = replace(known.get(name) or Source(name, place), place=place) if sign else known[name]
    if not chosen:
        raise GraftError(f"--tasks {settings.tasks!r}", "no name", f"choose among {', '.join(known)}")
    return list(chosen.values())


def _named(name: str, settings: BenchSettings) -> Source:
    if name == "digits":
        return Source(name, name)
    folder = settings.data_dir or os.environ.get("GRAFTWORK_DATA") or "."
    return Source(name, str(Path(folder).expanduser() / name))


def rows(source: Source, settings: BenchSettings) -> Rows:
    """The task with its rows written below --out; what an earlier call wrote for the same settings is taken as it is."""
    told = [*astuple(source), settings.train_rows, settings.dev_rows, settings.test_rows, bool(settings.suite)]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
    folder = Path(settings.out).expanduser() / "data" / f"{source.name}-{digest}"
    if not folder.is_dir():
        parts = split(source, read(source.place), settings)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        beside.mkdir()
        for name, part in parts.items():
            part.to_parquet(str(beside / name))
        try:
            beside.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(beside)
    return Rows(source, folder)


def split(source: Source, found: dict[str, Dataset], settings: BenchSettings) -> dict[str, Dataset]:
    """The rows of each file, drawn with a fixed seed. No row is in two of train, dev and test."""
    if "train" not in found:
        raise GraftError(f"the task {source.name!r}", f"only {', '.join(found)}", "give rows to train on")
    left = found["train"].shuffle(seed=0)
    if source.tested == "test" and "test" not in found and "eval" in found:
        source = replace(source, tested="eval")
    test, left = _part(found.get(source.tested), left, "test", settings.test_rows)
    given = found.get("eval") if source.tested != "eval" and not source.refit else None
    dev, left = _part(given, left, "dev", source.dev_rows or settings.dev_rows)
    most = settings.train_rows or source.train_rows or (len(left) if settings.suite else ROWS)
    if len(left) < 1:
        raise GraftError(
            f"the task {source.name!r}", f"{len(found['train'])} rows", "give more: train, dev and test need some each"
        )
    train = left.select(range(min(most, len(left))))
    return {TRAIN: train, DEV: dev, TEST: test, BOTH: concatenate_datasets([train, dev])}


def _part(given: Dataset | None, left: Dataset, name: str, most: int | None) -> tuple[Dataset, Dataset]:
    """The rows of a split, and what is left to learn from: taken from that where the source brings none."""
    if given is not None:
        chosen = given.shuffle(seed=0)
        return chosen.select(range(min(most or len(chosen), len(chosen)))), left
    count = max(1, min(most or len(left), round(HELD[name] * len(left))))
    return left.select(range(count)), left.select(range(count, len(left)))
