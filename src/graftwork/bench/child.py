"""One run in a process of its own: so that its peak of memory and its seconds are its own, and that whatever it does to the process
ends nothing but itself."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.errors import GraftError
from ..train import plugins
from ..train.run import train
from ..train.settings import DataSettings, FitSettings, TrainSettings

# scored once, at the end; a loss that is no number is said
TOLD = ("eval_strategy=no", "save_strategy=no", "logging_nan_inf_filter=false")


class Watch(TrainerCallback):
    """Seconds of the processor in training, and an end to a run whose loss is no number."""

    cpu = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.cpu = -time.process_time()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.cpu += time.process_time()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise DivergedError(state.global_step, float(loss))


class DivergedError(Exception):
    """The loss is no number any more."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"diverged: the loss is {loss} at step {step}")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """What came of a job: score, scores, seconds, cpu, memory, bytes, trained; or the reason of a failure."""
    watch = Watch()
    data, fit = DataSettings(**job["data"]), FitSettings(**{**job["fit"], "trainer": (*TOLD, *job["fit"]["trainer"])})
    settings = TrainSettings(job["backbone"], job["out"], data, method=job["method"], name="bench", fit=fit)
    try:
        result = train(settings, [watch])
    except (GraftError, DivergedError) as error:
        found = error.found if isinstance(error, GraftError) else ""
        return {"reason": f"refused: {error.asked}: {found}" if isinstance(error, GraftError) else str(error)}
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or "memory" in str(error).lower()
        return {"reason": f"{'out of memory' if full else 'failed'}: {type(error).__name__}: {str(error)[:300]}"}
    score = result.metrics.get(job["metric"])
    if score is None or not all(map(math.isfinite, result.metrics.values())):
        return {"reason": f"diverged: {job['metric']} = {score}, loss = {result.metrics.get('loss')}"}
    return {
        "score": score,
        "scores": result.metrics,
        "seconds": result.seconds,
        "cpu": watch.cpu,
        "memory": result.peak_bytes,
        "bytes": sum(f.stat().st_size for f in result.folder.glob("adapter*")),
        "trained": result.parameters,
        "device": next(result.model.parameters()).device.type,
    }


def job(
    backbone: str, out: Path, metric: str, method: str, data: DataSettings, fit: FitSettings, result: Path
) -> dict[str, Any]:
    """What `run` is told, as JSON."""
    told = {"backbone": backbone, "out": str(out), "metric": metric, "method": method, "result": str(result)}
    return {**told, "plugins": plugins.RAN, "data": dataclasses.asdict(data), "fit": dataclasses.asdict(fit)}


def main(file: str, log: str) -> None:
    """Do the job that a file holds, which also says where the result is written. What the process says goes to `log`."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the process that waits, which ends this one and gives the run back
    with open(log, "wb") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    told = json.loads(Path(file).read_text(encoding="utf-8"))
    for plugin in told["plugins"]:
        plugins.run(plugin)
    done = run(told)
    Path(told["result"]).write_text(json.dumps(done), encoding="utf-8")
