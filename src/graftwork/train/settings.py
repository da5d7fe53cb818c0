"""What a training job can be told: three frozen dataclasses from which the command line's options are made.

Every field is made by `option`, which holds its help text and its check. Only the standard library is imported here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from ..core.errors import GraftError

Check = Callable[[Any], str]  # the empty text, or what a good value looks like

TaskName = Literal["auto", "classification", "regression", "tokens", "causal", "seq2seq", "masked", "image"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


def option(help: str, *, default: Any = dataclasses.MISSING, check: Check | None = None, metavar: str = "") -> Any:
    """A field of the settings. Without a default it must be given."""
    metadata = {"help": help, "check": check, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def at_least(low: float, *, may_be_none: bool = False) -> Check:
    """A number >= low."""
    return lambda v: (
        "" if (v is None and may_be_none) or (v is not None and v >= low) else f"a number of at least {low}"
    )


def between(low: float, high: float) -> Check:
    """A number in [low, high)."""
    return lambda v: "" if low <= v < high else f"a number of at least {low} and below {high}"


def above(low: float, *, may_be_none: bool = False) -> Check:
    """A number > low."""
    return lambda v: "" if (v is None and may_be_none) or (v is not None and v > low) else f"a number above {low}"


def given(v: Any) -> str:
    """A text that is not empty."""
    return "" if isinstance(v, str) and v.strip() else "a text"


def flag(name: str) -> str:
    """The option of the command line for a field: --with for with_, which Python keeps for itself."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def check(settings: Any) -> None:
    """GraftError for the first setting out of its range."""
    for field in dataclasses.fields(settings):
        test, value = field.metadata.get("check"), getattr(settings, field.name)
        wanted = test(value) if test is not None else ""
        if wanted:
            name = flag(field.name)
            raise GraftError(f"the setting {name}", repr(value), f"give {wanted}: {field.metadata['help']}")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where the rows come from and which columns mean what."""

    data: str = option(
        "rows to learn from: a .csv .tsv .jsonl .json .parquet or .txt file; a folder of such files (train, dev, test) "
        "or of images in one folder per label; hub:NAME[/CONFIG] or hub:OWNER/NAME/*.tar; or digits (scikit-learn's images)",
        check=given,
        metavar="PATH",
    )
    eval_data: str | None = option("rows to evaluate on, in the same forms", default=None, metavar="PATH")
    holdout: float = option(
        "share of the rows held out for evaluation where the data brings none (0 evaluates on nothing)",
        default=0.1,
        check=between(0, 1),
    )
    text: str | None = option("the column with the text; guessed if not named", default=None, metavar="COLUMN")
    pair: str | None = option("the column with the second text of a pair", default=None, metavar="COLUMN")
    label: str | None = option(
        "the column with the label, the number, the tags or the target text", default=None, metavar="COLUMN"
    )
    task_column: str | None = option(
        "the column with each row's task, for methods that learn something for each task (poly)",
        default=None,
        metavar="COLUMN",
    )
    max_length: int | None = option(
        "tokens a text is cut at; by default what the backbone allows, at most 512",
        default=None,
        check=at_least(2, may_be_none=True),
    )
    max_rows: int | None = option(
        "take at most so many training rows", default=None, check=at_least(1, may_be_none=True)
    )

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How the training runs."""

    epochs: float = option("passes over the training rows", default=3.0, check=above(0))
    steps: int | None = option(
        "optimiser steps, in the place of --epochs", default=None, check=at_least(1, may_be_none=True)
    )
    batch: int = option("rows per step on each device", default=16, check=at_least(1))
    eval_batch: int = option("rows per evaluation step on each device", default=32, check=at_least(1))
    accumulate: int = option(
        "steps whose gradients are added up before the optimiser moves", default=1, check=at_least(1)
    )
    lr: float | None = option(
        "highest learning rate; by default the method's own (LoRA: 2e-3), on backbones wider than 384 less in proportion",
        default=None,
        check=above(0, may_be_none=True),
    )
    lr_factor: float = option(
        "the learning rate as a multiple of the methods' own, where no --lr is given", default=1.0, check=above(0)
    )
    weight_decay: float = option("weight decay of the optimiser", default=0.0, check=at_least(0))
    warmup: float = option("share of the steps in which the learning rate rises", default=0.06, check=between(0, 1))
    schedule: str = option("learning-rate schedule, as transformers names them", default="linear", check=given)
    seed: int = option("seed of the initial values, the order of the rows and dropout", default=0, check=at_least(0))
    precision: Precision = option("number format; auto is bf16 where the hardware has it", default="auto")
    checkpointing: bool = option("recompute activations in the backward pass to save memory", default=False)
    evaluate_every: int | None = option(
        "evaluate and write a checkpoint every so many steps; by default after each epoch",
        default=None,
        check=at_least(1, may_be_none=True),
    )
    early_stopping: int = option(
        "stop after so many evaluations without a better score and keep the best (0 never stops early)",
        default=0,
        check=at_least(0),
    )
    best: bool = option("keep the best evaluated state, not the last one", default=False)
    keep_checkpoints: bool = option("keep the checkpoints when training has ended", default=False)
    trainer: tuple[str, ...] = option(
        "any further argument of transformers.TrainingArguments; may be repeated", default=(), metavar="KEY=VALUE"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training job."""

    backbone: str = option("the frozen model: a folder or a name on the hub", check=given, metavar="NAME|FOLDER")
    out: str = option("folder the adapter is written to", check=given, metavar="FOLDER")
    data: DataSettings = option("the data")
    method: str = option(
        'methods, joined with +, e.g. "lora(r=8)" or "prefix(length=30) + parallel(d=512)"',
        default="lora(r=8)",
        check=given,
    )
    task: TaskName = option("what is learnt; auto guesses from the columns and the backbone", default="auto")
    name: str | None = option("the adapter's name; by default the folder's", default=None)
    fit: FitSettings = dataclasses.field(default_factory=FitSettings, metadata={"help": "the training"})
    resume: bool = option("go on from the last checkpoint in --out, if there is one", default=False)
    overwrite: bool = option("replace what an earlier run left in --out", default=False)
    with_: tuple[str, ...] = option(
        "a trained adapter that the method mixes, called as its folder, for fusion(of=['a', 'b']); frozen; may be repeated",
        default=(),
        metavar="FOLDER",
    )

    def __post_init__(self) -> None:
        check(self)

    def identity(self) -> dict[str, Any]:
        """What decides the result: a resumed run must have the same. Settings that only say how to go on are left
        out."""
        flat = dataclasses.asdict(self)
        return {k: v for k, v in flat.items() if k not in ("out", "resume", "overwrite")}
