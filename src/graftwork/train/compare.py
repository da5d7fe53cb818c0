"""Several adapters, and expressions over them, side by side: on one backbone, loaded once, on the same rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..expressions.algebra import A, Expr
from ..grafting.graft import activate, find
from ..store.hub import SCHEME, locate
from ..values.similarity import similarity
from . import tasks
from .described import metadata_of
from .metrics import IGNORED
from .several import by_name, over, whole
from .tasks import Task
from .trained import BATCH, Trained, open_named

TIMED, ROUNDS = 512, 3  # rows of one measurement of time, and how often each is made, in turn


@dataclass(frozen=True)
class Compared:
    """One adapter or expression beside the first.

    scores: the task's, as in `graftwork eval`;  parameters, bytes: of all adapters that it is made of, bytes on disk.
    seconds: of the forward passes over 1000 rows, the median of rounds in which all take their turns.
    cosine: of what it and the first change of the weights (`gw.similarity`), None where one changes something else.
    agreement: the share of the timed rows (of tokens, for tags) to which both give the same label; None without labels.
    """

    name: str
    scores: dict[str, float]
    parameters: int
    bytes: int
    seconds: float
    cosine: float | None
    agreement: float | None


def compare(
    entries: Sequence[str],
    rows: Dataset,
    more: Sequence[str] = (),
    backbone: str | None = None,
    batch: int = BATCH,
    columns: Mapping[str, str | None] | None = None,
) -> tuple[Task, list[Compared]]:
    """The task, and each entry's row of the table, in order.

    entries: folders (hub:NAME/REPO too), and expressions over what the folders are called;  more: folders for expressions only.
    backbone: where it is not what the first folder's file says;  columns: as `Trained.with_columns` takes them.
    Raises GraftError for fewer than two entries, adapters of different tasks or backbones, one that is nothing but a head,
    and what an expression is refused for.
    """
    if len(entries) < 2:
        raise GraftError(f"compare {', '.join(entries)}", "fewer than two", "give two adapters or expressions at least")
    if len(set(entries)) < len(entries):
        raise GraftError(f"compare {', '.join(entries)}", "one of them twice", "name each once")
    own = [entry for entry in entries if _is_folder(entry)]
    if not own and not more:
        raise GraftError(f"compare {', '.join(entries)}", f"no folder {entries[0]!r}", "give the folders of adapters")
    folders = by_name([locate(place) for place in dict.fromkeys((*own, *more))])
    texts = {entry: A(locate(entry).name) if entry in own else over(entry, folders) for entry in entries}
    for entry in own:
        _check_task(own[0], entry)
    trained, named = open_named(folders, backbone)
    trained = trained.with_columns(**(columns or {"text": None, "pair": None, "label": None}))
    made = {entry: whole(e, named) for entry, e in texts.items()}
    for entry, e in made.items():
        _check_head(entry, [find(trained.model, n) for n in e.names()])
        activate(trained.model, e)  # what cannot run is refused before anything is measured
    seconds, answers = _timed(trained, list(made.values()), rows, batch)
    out, first = [], next(iter(made.values()))
    for i, (entry, e) in enumerate(made.items()):
        activate(trained.model, e)
        scores = trained.evaluate(rows, batch)
        parameters = sum(find(trained.model, n).num_parameters for n in e.names())
        size = sum(_size(Path(locate(folders[n]).path)) for n in texts[entry].names())
        name = locate(entry).name if entry in own else entry
        alike = _cosine(trained, first, e)
        out.append(Compared(name, scores, parameters, size, seconds[i], alike, _agreement(answers[0], answers[i])))
    return trained.task, out


def _is_folder(entry: str) -> bool:
    return entry.startswith(SCHEME) or Path(entry).expanduser().exists()


def _check_task(first: str, other: str) -> None:
    """GraftError unless both were trained for one task."""
    told = [metadata_of(place)["metadata"].get("task") for place in (first, other)]
    for place, task in zip((first, other), told, strict=True):
        if task is None:
            do = "only adapters of graftwork train have one"
            raise GraftError(f"compare {place!r}", "no task in adapter.json", do)
    here, there = map(tasks.from_json, told)
    if (here.name, here.labels) != (there.name, there.labels):
        said = [f"{task.name}{' of ' if task.labels else ''}{', '.join(task.labels[:6])}" for task in (here, there)]
        found = f"{first!r} is for {said[0]}; {other!r} is for {said[1]}"
        raise GraftError(f"compare {first!r} and {other!r}", found, "compare adapters of one task")


def _check_head(entry: str, made_of: Sequence[Adapter]) -> None:
    """GraftError for a linear probe, which adapts no backbone."""
    if all(site.role in ("head", "pooler") for adapter in made_of for site in adapter.sites):
        do = "score it by itself, graftwork eval"
        raise GraftError(f"compare {entry!r}", "nothing but a head: it leaves the backbone as it is", do)


@torch.inference_mode()
def _timed(
    trained: Trained, made: Sequence[Expr], rows: Dataset, batch: int
) -> tuple[list[float], list[Tensor | None]]:
    """Seconds for 1000 rows of each expression, and the label that it gives to each row, or to each token with a tag."""
    few = rows.select(range(min(len(rows), TIMED)))
    encoded = list(trained.task.encode(few, trained.processor))
    collate = trained.task.collator(trained.processor, trained.model)
    batches = [trained._moved(collate(encoded[i : i + batch])) for i in range(0, len(encoded), batch)]
    times: list[list[float]] = [[] for _ in made]
    answers: list[Tensor | None] = []
    for turn in range(ROUNDS):
        for i, e in enumerate(made):
            activate(trained.model, e)
            if turn == 0 and trained.task.labels:
                answers.append(torch.cat([_labels(trained, inputs) for inputs in batches]))
            elif turn == 0:
                answers.append(None)
            trained.model(**batches[0])  # what a first pass makes and keeps is not timed
            _finished()
            start = time.perf_counter()
            for inputs in batches:
                trained.model(**inputs)
            _finished()
            times[i].append(1000 * (time.perf_counter() - start) / len(encoded))
    return [statistics.median(some) for some in times], answers


def _labels(trained: Trained, inputs: Mapping[str, Tensor]) -> Tensor:
    return trained.model(**inputs).logits.argmax(-1)[inputs["labels"] != IGNORED].cpu()


def _finished() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _agreement(one: Tensor | None, other: Tensor | None) -> float | None:
    return None if one is None or other is None else float((one == other).double().mean())


def _cosine(trained: Trained, first: Expr, e: Expr) -> float | None:
    try:
        return similarity(trained.model, first, e).cosine
    except GraftError:  # what changes activations has no change of weights
        return None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
