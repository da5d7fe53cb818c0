"""The moments of a loop that some methods need: a schedule's step, an auxiliary loss, calibration, and the context of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import GraftError
from . import install
from .graft import active_adapters


def step(model: nn.Module, progress: float, optimizer: torch.optim.Optimizer | None = None) -> None:
    """A moment of training: call it after each optimiser step, before zero_grad. progress: the share of training done, in [0, 1].

    Methods with a schedule (AdaLoRA) take their decisions here. optimizer: where a method begins parameters anew (LoSiA's next
    sub-network, the second phase of a lottery ticket), its state for these is dropped; without it, its moments run on.
    """
    if not 0 <= progress <= 1:
        raise GraftError(f"gw.step(progress={progress})", "out of range", "give the share of training done, in [0, 1]")
    for adapter in active_adapters(model):
        for part in adapter.parts:
            part.method.step(part, progress)
            for p in part.renewed if optimizer is not None else ():
                optimizer.state.pop(p, None)  # type: ignore[union-attr]
            part.renewed.clear()
    install.root_of(model).clock.stepped()


def auxiliary_loss(
    model: nn.Module, outputs: Any = None, again: Callable[[], Any] | None = None, *, apart: bool = False
) -> Tensor | float:
    """The sum of the active methods' terms of the loss; 0.0 where there are none. Add it to the task's loss.

    outputs, again: what the training pass gave (with logits), and a function that runs the model on the same batch once more: asked for by
        methods that compare two passes (AdaMix), and by no others. GraftError where they are missing.
    apart: instead, the terms that have an optimiser step of their own (alternating OrthoAdapters), after another pass over the batch.
    """
    parts = [part for a in active_adapters(model) for part in a.parts if ("apart" in part.method.needs) == apart]
    found = [delta.auxiliary_loss() for part in parts for delta in part.deltas.values()]
    terms = [loss for loss in found if loss is not None]
    twice = [part for part in parts if "again" in part.method.needs]
    if twice:
        if outputs is None or again is None:
            do = "call gw.auxiliary_loss(model, outputs, lambda: model(**batch))"
            raise GraftError(f"the loss of {twice[0].method}", "it compares two passes, and knows of one", do)
        one, other = _logits(outputs), _logits(again())
        terms += [part.method.compare(part, one, other) for part in twice]
    return sum(terms[1:], terms[0]) if terms else 0.0


def _logits(outputs: Any) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        found, do = f"{type(outputs).__name__}, without logits", "give the model's output, or the logits themselves"
        raise GraftError("compare two passes", found, do)
    return logits


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> None:
    """A pass over `batches` before training, or as many as asked for, for methods that need data (SNIP masks).

    loss(model, batch) gives the loss whose gradients they see; by default the batch is a mapping, and the loss is model(**batch).loss.
    The gradients are cleared afterwards.
    """
    parts = [part for adapter in active_adapters(model) for part in adapter.parts if "calibrate" in part.method.needs]
    if not parts:
        raise GraftError("gw.calibrate", "no active method needs calibration", "leave the call out")
    batches = list(batches)  # a method may ask for another pass
    if not batches:
        raise GraftError("gw.calibrate", "no batch", "give at least one batch")
    while parts:
        for part in parts:
            part.method.calibrating(part)
        for batch in batches:
            value = loss(model, batch) if loss is not None else _own_loss(model, batch)
            for part in parts:
                part.method.observe(part, value)
            value.backward()
            for part in parts:
                part.method.calibrate(part)
            for adapter in active_adapters(model):
                for p in adapter.parameters():
                    p.grad = None
        parts = [part for part in parts if part.method.calibrated(part)]


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise GraftError(
            "gw.calibrate", f"a batch of type {type(batch).__name__}", "give mappings with labels, or loss="
        )
    value = getattr(model(**batch), "loss", None)
    if not isinstance(value, Tensor):
        raise GraftError("gw.calibrate", "the model returned no loss", "put labels into the batch, or give loss=")
    return value


class context:  # a verb that is also a with-block
    """Side information for the next batches: gw.context(model, task="mnli"). In a with-statement it holds for the block."""

    def __init__(self, model: nn.Module, **given: Any) -> None:
        self._runtime = install.root_of(model).runtime
        self._before = dict(self._runtime.context)
        self._runtime.context |= given

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        self._runtime.context = self._before
