"""Which methods take part, and at which size: each task's backbone is looked at on the meta device, without its weights."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from .. import combinators, methods  # noqa: F401  (they register the names)
from ..core.errors import GraftError
from ..core.method import PRESETS, REGISTRY
from ..core.text import HYPHENATED, parse_methods
from ..grafting.graft import graft
from ..grafting.install import base_parameters, body_of
from ..train import tasks as kinds
from ..train.backbone import config_of, quiet
from ..train.data import read
from ..train.settings import DataSettings, TrainSettings
from . import digits
from .budget import Methods, allowed, solve
from .settings import BenchSettings
from .tasks import TRAIN, Rows

ALL = "all"


@dataclass(frozen=True)
class Task:
    """A task of this bench. metric: its name among the scores;  parameters: of the backbone;  budget: what is allowed on it;
    padded: rows are of several lengths."""

    rows: Rows
    backbone: str
    metric: str
    larger: bool
    parameters: int
    budget: int | None
    padded: bool = True

    @property
    def name(self) -> str:
        return self.rows.name


@dataclass(frozen=True)
class Entry:
    """One method on one task: as it was asked for, and as it is run. reason: why it is left out, or the empty text."""

    task: str
    label: str
    text: str = ""
    parameters: int = 0
    reason: str = ""


def labels(settings: BenchSettings) -> dict[str, bool]:
    """What --methods names, in order -> whether it was named itself, and must fit. GraftError for an unknown method."""
    out: dict[str, bool] = {}
    for text in _texts(settings.methods):
        if text == ALL:
            for name in sorted([*REGISTRY, *PRESETS]):
                out.setdefault(name, False)
        else:
            parse_methods(text)
            out[text] = True
    return out


def _texts(given: str) -> list[str]:
    """The parts of "lora(r=8), prefix(length=3) + parallel(d=4)" between the outer commas."""
    text = HYPHENATED.sub(lambda m: m[0].replace("-", "_"), given.replace("\n", " ").strip().rstrip(","))
    try:
        tree = ast.parse(f"({text},)", mode="eval").body
    except SyntaxError as error:
        do = 'join methods with commas: "lora(r=8), bottleneck", or write all'
        raise GraftError(f"--methods {given!r}", f"not methods: {error.msg}", do) from None
    assert isinstance(tree, ast.Tuple)
    return [ast.get_source_segment(f"({text},)", part) or "" for part in tree.elts]


def task_of(rows: Rows, settings: BenchSettings, say: Callable[[str], None]) -> tuple[Task, nn.Module]:
    """The task on its backbone, and that backbone on the meta device with the head that the task needs."""
    name = _backbone(rows, settings, say)
    config = config_of(name)
    source = rows.source
    data = DataSettings(
        str(rows.folder / TRAIN), text=source.text, pair=source.pair, label=source.label, max_length=settings.max_length
    )
    told = TrainSettings(name, str(Path(settings.out) / "run"), data)
    kind = kinds.plan(told, read(data.data)["train"], config)
    model = _on_meta(name, kind)
    size = sum(p.numel() for _, p in base_parameters(model))
    metric = source.metric or kind.best
    larger = kind.larger or metric != kind.best
    return Task(rows, name, metric, larger, size, allowed(settings.budget, size), kind.padded), model


def _backbone(rows: Rows, settings: BenchSettings, say: Callable[[str], None]) -> str:
    """The settings' backbone; for the digits a small one of the bench's own, unless the settings' looks at images."""
    if rows.source.place == "digits" and not hasattr(config_of(settings.backbone), "image_size"):
        return str(digits.backbone(rows.folder, Path(settings.out).expanduser() / "backbones" / rows.folder.name, say))
    return settings.backbone


def _on_meta(name: str, kind: kinds.Task) -> nn.Module:
    config = config_of(name)
    for key, value in kind.config().items():
        setattr(config, key, value)
    try:
        with torch.device("meta"), quiet():
            made: nn.Module = getattr(transformers, kind.auto).from_config(config)
    except ValueError as error:
        do = "choose another backbone, or leave the task out"
        raise GraftError(f"the backbone {name!r} for {kind.name}", str(error).split("\n")[0][:200], do) from error
    return made


def entries(task: Task, model: nn.Module, chosen: dict[str, bool]) -> list[Entry]:
    """Every method at its size for this task. GraftError where one that was named itself does not fit or cannot be grafted; one
    of "all" is left out with the reason."""
    anatomy, out = body_of(model).anatomy, []

    def builds(made: Methods) -> None:
        # with the head's fresh deltas, as in training; removed again by making the model anew
        with torch.device("meta"):
            copy = type(model)(model.config)  # type: ignore[arg-type]
        graft(copy, list(made), "tried", seed=0)

    for label, named in chosen.items():
        try:
            made = parse_methods(label)
            if any(m.mixes for m in made):
                raise GraftError(label, "it mixes other adapters, which must be trained first", "leave it out")
            solved = solve(made, anatomy, task.budget, builds)
            out.append(Entry(task.name, label, str(solved), solved.count))
        except GraftError as error:
            if named:
                raise GraftError(f"{error.asked} (task {task.name})", error.found, error.do) from error
            out.append(Entry(task.name, label, reason=error.found))
    return out


def taken(every: Sequence[Entry]) -> list[Entry]:
    """Those that are run."""
    return [entry for entry in every if not entry.reason]
