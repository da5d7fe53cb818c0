"""A progress bar of the training, with the latest loss and scores."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .console import errors

SHOWN = 3  # scores beside the bar


class Runs:
    """One bar for many runs, each of which is a line above it when it is over."""

    def __init__(self) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=errors)
        self.task = self.progress.add_task("", total=None)
        self.last = ""

    def __enter__(self) -> Runs:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def tell(self, over: int, of: int, last: str) -> None:
        """How many runs of how many are over, and what the last one of this process was."""
        self.progress.update(self.task, completed=over, total=of)
        if last != self.last:
            self.progress.console.print(last, markup=False)
            self.last = last


class Bar(TrainerCallback):
    """One bar for all steps; each evaluation is a line above it. Only the first process draws."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, TextColumn("{task.fields[latest]}"), console=errors)
        self.task: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.progress.start()
            self.task = self.progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, latest=""
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.task is None or not logs:
            return
        if "loss" in logs:
            self.progress.update(self.task, latest=f"loss {float(logs['loss']):.4f}")
        scores = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_") and isinstance(v, float)}
        kept = [(k, v) for k, v in scores.items() if not k.endswith(("runtime", "per_second", "loss"))][:SHOWN]
        if kept:
            text = "  ".join(f"{name} {value:.4g}" for name, value in kept)
            self.progress.console.print(f"epoch {state.epoch:.2f}  step {state.global_step}  {text}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; to be called whatever happened."""
        self.progress.stop()
        self.task = None
