"""What a bench can be told: a frozen dataclass from which the command line's options are made. Only the standard library is imported."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.errors import GraftError
from ..train.settings import Precision, above, at_least, check, given, option

# what may differ between two calls on one file: it adds runs, or says how they are done, and changes none that is there
FREE = ("out", "tasks", "methods", "seeds", "workers", "storage", "study", "timeout", "lease", "data_dir")


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """One bench. The same settings on the same --out go on where an earlier call stopped."""

    backbone: str = option("the frozen model: a folder or a name on the hub", check=given, metavar="NAME|FOLDER")
    out: str = option("folder of the results: bench.sqlite, index.html", check=given, metavar="FOLDER")
    tasks: str | None = option(
        "names (sst2, subj, digits, or those of --suite) and NAME=PATH, joined with commas; PATH is anything that graftwork train "
        "--data takes",
        default=None,
        metavar="NAMES",
    )
    suite: str | None = option(
        "a benchmark of the literature, with its metrics, splits and published numbers: glue or vtab; --tasks chooses among it",
        default=None,
        metavar="NAME",
    )
    methods: str = option(
        'methods as text, joined with commas, or "all": every one that is trained by itself and fits',
        default="all",
        check=given,
        metavar="METHODS",
    )
    budget: str = option(
        "parameters that each method may train beside the head: a share of the backbone (0.5%), a number, or none for sizes as the "
        "texts say",
        default="0.5%",
        check=given,
        metavar="SHARE|NUMBER",
    )
    seeds: int = option("runs of each method and task, at its best learning rate", default=3, check=at_least(1))
    lrs: str = option(
        "learning rates that each method tries on the dev rows, once each; the best one is taken for all seeds. x0.5 is half of the "
        "method's own default, 5e-4 the same for all",
        default="x0.25,x1,x4",
        check=given,
        metavar="NUMBERS",
    )
    train_rows: int | None = option(
        "rows to learn from; by default 2000 (a suite: its own)", default=None, check=at_least(1, may_be_none=True)
    )
    dev_rows: int | None = option(
        "at most so many rows to choose learning rates on", default=500, check=at_least(1, may_be_none=True)
    )
    test_rows: int | None = option(
        "at most so many rows to test on; by default all", default=None, check=at_least(1, may_be_none=True)
    )
    epochs: float = option("passes over the training rows", default=1.0, check=above(0))
    steps: int | None = option(
        "optimiser steps, in the place of --epochs", default=None, check=at_least(1, may_be_none=True)
    )
    batch: int = option("rows per step", default=16, check=at_least(1))
    precision: Precision = option("number format; auto is bf16 where the hardware has it", default="auto")
    max_length: int | None = option(
        "tokens a text is cut at; by default what the backbone allows, at most 512",
        default=None,
        check=at_least(2, may_be_none=True),
    )
    data_dir: str | None = option(
        "folder with sst2/ and subj/; by default the environment's GRAFTWORK_DATA", default=None, metavar="FOLDER"
    )
    workers: int = option("runs at a time on this machine, each in a process of its own", default=1, check=at_least(1))
    timeout: float | None = option(
        "minutes after which a run is ended and counts as failed", default=None, check=above(0, may_be_none=True)
    )
    lease: float = option(
        "seconds without a sign of life after which another worker takes a run again", default=60.0, check=at_least(1)
    )
    storage: str | None = option(
        "work on one bench with several machines: the URL of a data base that optuna can share, e.g. postgresql://...",
        default=None,
        metavar="URL",
    )
    study: str = option("the bench's name in --storage", default="graftwork-bench", check=given, metavar="NAME")

    def __post_init__(self) -> None:
        check(self)
        self.rates()
        if not self.tasks and not self.suite:
            raise GraftError("a bench", "neither --tasks nor --suite", "name some, e.g. --tasks sst2,subj,digits")

    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried, or multiples of the methods' own (`relative`). GraftError where they are neither."""
        parts = [part.strip() for part in self.lrs.split(",")]
        try:
            rates = tuple(dict.fromkeys(float(part.removeprefix("x")) for part in parts))
        except ValueError:
            rates = ()
        alike = len({part.startswith("x") for part in parts}) == 1
        if not rates or not alike or not all(0 < rate < float("inf") for rate in rates):
            found = "numbers and multiples" if rates and not alike else "not numbers above 0"
            raise GraftError(f"--lrs {self.lrs}", found, "give them joined with commas: 5e-4,2e-3, or x0.25,x1,x4")
        return rates

    @property
    def relative(self) -> bool:
        """Whether learning rates are multiples of the methods' own."""
        return self.lrs.strip().startswith("x")

    def rate(self, lr: float | None) -> str:
        """A learning rate for people."""
        return "–" if lr is None else f"{'x' if self.relative else ''}{lr:g}"

    def identity(self) -> dict[str, Any]:
        """What decides the result of a run: all calls on one file must agree on it."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE}
