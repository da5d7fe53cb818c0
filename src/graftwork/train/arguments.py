"""From the settings to `transformers.TrainingArguments`, and the free arguments that are passed through."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import accelerate
import torch
from torch import nn
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..core.errors import GraftError, nearest
from ..core.method import Method
from ..sites.anatomy import anatomy
from .settings import FitSettings
from .tasks import Task

OURS = (
    "output_dir",
    "resume_from_checkpoint",
    "remove_unused_columns",
    "push_to_hub",
    "save_only_model",
    "label_names",
    "do_train",
)
KNOWN = tuple(field.name for field in dataclasses.fields(TrainingArguments) if field.init)


def arguments(fit: FitSettings, task: Task, folder: str, lr: float, evaluates: bool) -> TrainingArguments:
    """What the Trainer is told. folder: where checkpoints go;  evaluates: there are rows to evaluate on.

    GraftError for an unknown or ill-typed pass-through argument, early stopping without evaluation, an unknown
    schedule.
    """
    if fit.schedule not in {s.value for s in SchedulerType}:
        names = [s.value for s in SchedulerType]
        raise GraftError(
            f"--schedule {fit.schedule}", f"unknown{nearest(fit.schedule, names)}", f"choose one of {', '.join(names)}"
        )
    best = fit.best or fit.early_stopping > 0
    if best and not evaluates:
        raise GraftError("keep the best state", "no rows to evaluate on", "give --eval-data, or a --holdout above 0")
    cadence = "steps" if fit.evaluate_every else "epoch"
    given: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": fit.epochs,
        "max_steps": fit.steps or -1,
        "per_device_train_batch_size": fit.batch,
        "per_device_eval_batch_size": fit.eval_batch,
        "gradient_accumulation_steps": fit.accumulate,
        "learning_rate": lr,
        "weight_decay": fit.weight_decay,
        "warmup_steps": fit.warmup,  # below 1: a share of all steps
        "lr_scheduler_type": fit.schedule,
        "seed": fit.seed,
        "use_cpu": _on_cpu(fit),
        "bf16": fit.precision == "bf16" or (fit.precision == "auto" and has_bf16()),
        "fp16": fit.precision == "fp16",
        # evaluated and saved at the same moments: a resumed run then sees what an uninterrupted one saw
        "eval_strategy": cadence if evaluates else "no",
        "eval_steps": fit.evaluate_every,
        "save_strategy": cadence,
        "save_steps": fit.evaluate_every or 500,
        "save_total_limit": 2,
        "load_best_model_at_end": best,
        "metric_for_best_model": f"eval_{task.best}" if evaluates else None,
        "greater_is_better": task.larger,
        "logging_steps": 10,
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "restore_callback_states_from_checkpoint": True,
        # adapters are used in every step; a backbone that drops layers at random needs --trainer
        # ddp_find_unused_parameters=true
        "ddp_find_unused_parameters": False,
    }
    if fit.checkpointing:
        # renamed during transformers 5
        given["activation_checkpointing" if "activation_checkpointing" in KNOWN else "gradient_checkpointing"] = True
    given |= passed_through(fit.trainer)
    try:
        return TrainingArguments(**given)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise GraftError("the arguments of the Trainer", str(error).split("\n")[0], "change them") from error


def default_lr(model: nn.Module) -> float:
    """The learning rate where nobody gives one: `Method.lr` for a backbone up to 384 wide, less in proportion for wider ones (2e-4
    at 4,096, as QLoRA has it)."""
    width = max((site.d for site in anatomy(model).of("block")), default=0)
    return Method.lr * min(1.0, 384 / max(width, 1))


def shard_by_block(given: TrainingArguments, model: nn.Module) -> None:
    """Under FSDP, make each repeated block a unit, unless the configuration says otherwise. accelerate's own
    choice, the model's `_no_split_modules`, names the embeddings of some models too, and then fails on the table
    inside them."""
    if given.fsdp and "transformer_cls_names_to_wrap" not in given.fsdp_plugin_args:
        names = sorted({type(site.module).__name__ for site in anatomy(model).of("block")})
        if names:
            given.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(names)


def processes(fit: FitSettings) -> accelerate.PartialState:
    """This process among those of torchrun or accelerate launch. Without an accelerator they work on CPUs, over
    gloo."""
    return accelerate.PartialState(cpu=_on_cpu(fit))


def _on_cpu(fit: FitSettings) -> bool:
    return bool(passed_through(fit.trainer).get("use_cpu", not torch.accelerator.is_available()))


def has_bf16() -> bool:
    """Whether the accelerator computes in bfloat16 (a CPU is left in float32: it gains no time there)."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def passed_through(given: tuple[str, ...]) -> dict[str, Any]:
    """key=value texts as typed arguments. GraftError for an unknown key (nearest name), one that graftwork sets,
    or a wrong type."""
    out: dict[str, Any] = {}
    for text in given:
        key, sign, value = text.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        if not sign:
            raise GraftError(f"--trainer {text}", "no '='", "write --trainer key=value")
        if key not in KNOWN:
            raise GraftError(
                f"--trainer {text}", f"TrainingArguments has no {key!r}{nearest(key, KNOWN)}", "see its documentation"
            )
        if key in OURS:
            raise GraftError(f"--trainer {text}", "graftwork sets it itself", "use graftwork's own options")
        out[key] = _typed(key, value, text)
    return out


def _typed(key: str, value: str, text: str) -> Any:
    parser = HfArgumentParser(TrainingArguments, add_help=False, allow_abbrev=False, exit_on_error=False)  # type: ignore[arg-type]
    try:
        read = getattr(parser.parse_args(["--output_dir", ".", f"--{key}", value]), key)
        # some fields are declared as texts and take true as well (fsdp)
        return {"true": True, "false": False}.get(read.lower(), read) if isinstance(read, str) else read
    except (argparse.ArgumentError, ValueError, SystemExit) as error:
        found = getattr(error, "message", None) or str(error)
        raise GraftError(f"--trainer {text}", f"{value!r}: {found}", f"give {key} a value of its type") from error
