"""The main job: backbone, data, graft, train, evaluate, save."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from .. import (
    combinators,  # noqa: F401  (they register the names that --method uses)
    methods,  # noqa: F401  (they register the names that a job or a file uses)
)
from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.text import parse_methods
from ..grafting.graft import activate, graft, remove
from ..grafting.install import base_parameters
from ..grafting.moments import calibrate
from ..store import load as load_adapter
from ..store import save
from ..store.hub import locate
from . import backbone, checkpoints
from .arguments import arguments, default_lr, processes, shard_by_block
from .columns import ordered
from .data import read
from .output import check_folder, memory_peak, storage_error
from .row_tasks import into_context, marked, with_tasks
from .settings import DataSettings, TrainSettings
from .several import by_name, check_mixed, load_named
from .tasks import Task, plan
from .trainer import ADAPTER, Best, GraftTrainer, Interrupt, gathered

Say = Callable[[str], None]
CALIBRATION = 8  # batches, for methods that look at data before training


@dataclass(frozen=True)
class Result:
    """What a finished job returns.

    folder: where the adapter is;  metrics: of the evaluation rows (empty where there are none);  parameters,
    backbone_parameters: how many are trained and frozen;  seconds: of the training alone;  peak_bytes: of memory;
    history: the Trainer's log.
    model, adapter, task, processor: as they were trained, for going on in Python.
    """

    folder: Path
    metrics: dict[str, float]
    parameters: int
    backbone_parameters: int
    seconds: float
    peak_bytes: int
    history: tuple[dict[str, Any], ...]
    model: torch.nn.Module
    adapter: Adapter
    task: Task
    processor: Any


def train(settings: TrainSettings, callbacks: Sequence[TrainerCallback] = (), say: Say = lambda text: None) -> Result:
    """Run one job and save the adapter. `say` is told, in a line each, what was found and guessed.

    Every problem of the input is a GraftError before the first step, and leaves the disk as it was.
    KeyboardInterrupt leaves the checkpoints; the same settings with resume=True then go on to the result of an
    uninterrupted run.
    """
    out = Path(settings.out).expanduser()
    asked = parse_methods(settings.method)
    process = processes(settings.fit)
    name = settings.name or out.resolve().name
    check_folder(out, settings)
    members = by_name([locate(folder) for folder in settings.with_], name)
    rows, held_out = _rows(settings)
    config = backbone.config_of(settings.backbone)
    task = plan(settings, rows, config)
    say(
        f"task {task.name}: {task.columns.describe()}"
        + (f"; labels {', '.join(task.labels[:12])}" if task.labels else "")
    )
    asked = with_tasks(asked, rows, task)
    if held_out is None and settings.data.holdout:
        rows, held_out = split(rows, task, settings)
    say(f"{len(rows):,} rows to learn from, {len(held_out) if held_out is not None else 0:,} to evaluate on")

    set_seed(settings.fit.seed)
    loaded = backbone.load(settings.backbone, task)
    encoded = marked(task.encode(rows, loaded.processor, training=True), rows, task, asked)
    encoded_held_out = marked(task.encode(held_out, loaded.processor), held_out, task, asked) if held_out else None
    folder = out / checkpoints.FOLDER
    last = _interrupted(folder, settings, process)
    load_named(loaded.model, members)
    if last is None:
        every = backbone.with_fresh(loaded.model, asked, loaded.fresh)
        adapter = graft(loaded.model, every, name, seed=settings.fit.seed)
    else:
        say(f"going on from {last}")
        adapter = load_adapter(loaded.model, last / ADAPTER, name, trainable=True)
    check_mixed(adapter, list(members))
    adapter.labels = task.labels or None
    size = sum(p.numel() for _, p in base_parameters(loaded.model))
    count = adapter.num_parameters
    share = f"{count:,} parameters, {100 * count / size:.3f}% of the backbone's {size:,}"
    say(f"{' + '.join(map(str, adapter.methods))}: {share}")

    lr = settings.fit.lr or settings.fit.lr_factor * default_lr(loaded.model)
    best, interrupt = Best(adapter), Interrupt()
    told: list[TrainerCallback] = [interrupt] if process.num_processes == 1 else []
    if settings.fit.best or settings.fit.early_stopping:
        told.append(best)
    if settings.fit.early_stopping:
        told.append(EarlyStoppingCallback(settings.fit.early_stopping))
    told_trainer = arguments(settings.fit, task, str(folder), lr, held_out is not None)
    shard_by_block(told_trainer, loaded.model)
    trainer = GraftTrainer(
        adapter=adapter,
        task=task,
        own_rates=settings.fit.lr is None,
        model=loaded.model,
        args=told_trainer,
        data_collator=task.collator(loaded.processor, loaded.model),
        train_dataset=encoded,
        eval_dataset=encoded_held_out,
        compute_metrics=lambda p: task.metrics(p.predictions, p.label_ids),
        preprocess_logits_for_metrics=task.shrink,
        callbacks=[*told, *callbacks],
    )
    trainer.can_return_loss = True
    if last is None and any("calibrate" in method.needs for method in adapter.methods):
        _calibrate(loaded.model, trainer, encoded, settings)
    if process.is_main_process and last is None:
        checkpoints.remember(folder, settings.identity())
    if last is not None and best in told:
        _recall_best(best, loaded.model, last)
    start = time.perf_counter()
    try:
        with interrupt.listening():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        best.restore()
        seconds = time.perf_counter() - start
        scores = _scores(trainer) if held_out is not None else {}
        adapter.metadata = _metadata(settings, task, scores, seconds, trainer, len(rows), held_out, lr)
        with gathered(adapter):
            if process.is_main_process:
                save(loaded.model, name, out)
    except (OSError, RuntimeError) as error:
        raise storage_error(out, error) from error
    process.wait_for_everyone()
    if process.is_main_process and not settings.fit.keep_checkpoints:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(
        out,
        scores,
        count,
        size,
        seconds,
        memory_peak(),
        tuple(trainer.state.log_history),
        loaded.model,
        adapter,
        task,
        loaded.processor,
    )


def _rows(settings: TrainSettings) -> tuple[Dataset, Dataset | None]:
    """The training rows and, where the source or --eval-data brings them, the rows to evaluate on."""
    found = read(settings.data.data)
    if "train" not in found:
        raise GraftError(f"the data {settings.data.data!r}", f"only {', '.join(found)}", "name one of the files train")
    rows = found["train"]
    if settings.data.max_rows is not None and len(rows) > settings.data.max_rows:
        rows = rows.shuffle(seed=settings.fit.seed).select(range(settings.data.max_rows))
    if settings.data.eval_data is not None:
        return rows, chosen_split(settings.data.eval_data)
    return rows, found.get("eval") or found.get("test")


def chosen_split(source: str) -> Dataset:
    """The rows to evaluate on of a source: its test split, or its evaluation split, or all it has."""
    found = read(source)
    return found.get("test") or found.get("eval") or found["train"]


def split(rows: Dataset, task: Task, settings: TrainSettings) -> tuple[Dataset, Dataset | None]:
    """Hold some rows out for evaluation; of classes, so that each keeps its share and none is lost to training."""
    wanted = round(len(rows) * settings.data.holdout)
    if wanted < 1 or wanted >= len(rows):
        return rows, None
    shuffled = rows.shuffle(seed=settings.fit.seed)
    column = task.columns.label
    if not task.labels or task.name == "tokens" or column is None:
        return shuffled.select(range(wanted, len(rows))), shuffled.select(range(wanted))
    by_class: dict[str, list[int]] = {}
    for i, value in enumerate(shuffled[column]):
        by_class.setdefault(str(value), []).append(i)
    held: list[int] = []
    for label in ordered(list(by_class)):
        of_class = by_class[label]
        held += of_class[: min(round(len(of_class) * settings.data.holdout), len(of_class) - 1)]
    if not held:
        return rows, None
    kept = set(held)
    return shuffled.select([i for i in range(len(rows)) if i not in kept]), shuffled.select(sorted(held))


def _interrupted(folder: Path, settings: TrainSettings, process: Any) -> Path | None:
    """The checkpoint to go on from, if asked to and if there is one."""
    if not settings.resume:
        if process.is_main_process and settings.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        process.wait_for_everyone()
        return None
    last = checkpoints.last_whole(folder, process.num_processes)
    if last is not None:
        checkpoints.check_same(folder, settings.identity())
    return last


def _calibrate(model: torch.nn.Module, trainer: GraftTrainer, encoded: Dataset, settings: TrainSettings) -> None:
    """Show a few batches to the methods that look at data before training: the same ones in every process."""
    shown = encoded.shuffle(seed=settings.fit.seed).select(range(min(len(encoded), CALIBRATION * settings.fit.batch)))
    batches = []
    for i in range(0, len(shown), settings.fit.batch):
        rows = [shown[j] for j in range(i, min(i + settings.fit.batch, len(shown)))]
        batches.append({k: v.to(trainer.args.device) for k, v in trainer.data_collator(rows).items()})
    with torch.random.fork_rng():
        torch.manual_seed(settings.fit.seed)
        calibrate(model.train(), batches, lambda m, batch: m(**into_context(m, batch)).loss)


def _recall_best(best: Best, model: torch.nn.Module, last: Path) -> None:
    """Take the values of the checkpoint that the interrupted run had found best."""
    state = checkpoints.read_state(last) or {}
    folder = Path(state.get("best_model_checkpoint") or "")
    score = state.get("best_metric")
    if score is None or not (folder / ADAPTER).is_dir():
        return
    beside = f"{best.adapter.name} at its best"
    found = load_adapter(model, folder / ADAPTER, beside).state_dict()
    best.start_from({name: value.detach().clone() for name, value in found.items()}, score)
    remove(model, beside)
    activate(model, best.adapter.name)


def _scores(trainer: GraftTrainer) -> dict[str, float]:
    """The scores of the state that the model is in, under their plain names; what training has just evaluated, is not once more."""
    state, of = trainer.state, trainer.state.log_history
    last = next((entry for entry in reversed(of) if "eval_loss" in entry and entry["step"] == state.global_step), None)
    kept = not trainer.args.load_best_model_at_end or state.best_global_step == state.global_step
    found = last if last is not None and kept else trainer.evaluate()
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {key.removeprefix("eval_"): float(value) for key, value in found.items() if key.startswith("eval_")}
    return {key: value for key, value in named.items() if key not in timing}


def _metadata(
    settings: TrainSettings,
    task: Task,
    scores: dict[str, float],
    seconds: float,
    trainer: GraftTrainer,
    rows: int,
    held_out: Dataset | None,
    lr: float,
) -> dict[str, Any]:
    """How the adapter came about, for people and for `graftwork predict`."""
    local = Path(settings.backbone).expanduser()
    data: DataSettings = settings.data
    return {
        "task": task.to_json(),
        "backbone": str(local.resolve()) if local.is_dir() else settings.backbone,
        "data": {
            "source": data.data,
            "rows": rows,
            "evaluated": data.eval_data or data.data,
            "evaluated_rows": len(held_out or ()),
        },
        "metrics": scores,
        "training": {
            "method": settings.method,
            **({"with": list(settings.with_)} if settings.with_ else {}),
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "seconds": round(seconds, 1),
            "learning_rate": lr,
            "batch": settings.fit.batch * settings.fit.accumulate * trainer.args.world_size,
            "seed": settings.fit.seed,
            "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
            "processes": trainer.args.world_size,
            "trainer": list(settings.fit.trainer),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "datasets": datasets.__version__,
            },
        },
    }
