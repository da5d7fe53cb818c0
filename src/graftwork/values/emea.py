"""Ensembling at test time: how much of each adapter is taken is found for every input by the entropy of the model's own prediction.

Wang et al. 2021, "Efficient Test Time Adapter Ensembling for Low-resource Language Varieties" (EMEA), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import GraftError
from ..expressions.algebra import A, Expr, as_expr
from ..expressions.mixing import route
from ..grafting.graft import activate, active, adapters, find, graft, remove
from ..methods.routing.weighted import Weighted


@dataclass(frozen=True)
class Ensemble:
    """What `emea` found for a batch.

    output: of the model with the final weights;  entropy: H [steps + 1, batch] before each step and at the end, in nats;
    logits: a [batch, N] of each place, by its key;  weights: their softmax, which adds up to 1 over the N adapters.
    """

    output: Any
    entropy: Tensor
    logits: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {key: torch.softmax(a, -1) for key, a in self.logits.items()}


def emea(
    model: nn.Module,
    of: Sequence[Expr | str],
    batch: Mapping[str, Any],
    *,
    behind: Expr | str | None = None,
    steps: int = 1,
    gamma: float = 10.0,
    mask: Tensor | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Ensemble:
    """Predict with a mixture of adapters whose weights at every place i minimise the entropy of the prediction, row by row:

        z_i = sum_n softmax(a_i)_n z_{i,n},   a_i <- a_i - gamma dH/da_i  (`steps` times),   H = mean_t -sum_y p_t(y) log p_t(y)

    of: the adapters, names or expressions;  behind: what stands behind their mixture, such as a task adapter with its head.
    batch: what the model is called with, model(**batch), which gives logits [batch, (seq,) classes].
    steps: T, 0 is the plain mean of the adapters' outputs, 1 and 10 are the paper's;  gamma: the size of a step.
    mask: the labelled tokens [batch, seq], over which H is the mean; None takes the batch's attention_mask, or all.
    start: the logits a to begin with, [batch or 1, N] for each place, such as those of the `Ensemble` before, so that they are kept
        from one example to the next; None is a = 0.5 everywhere. Each row of a batch has weights of its own, as if it came alone.
    Costs `steps` passes forward and backward through the model. No parameter changes, and nothing stays grafted or active.
    Raises GraftError, with the model as it was, for an unknown adapter, a model in training, an output without logits, and numbers,
    masks or a start that do not fit.
    """
    members = [as_expr(e) for e in of]
    mixed = route(*members, by=_free(model))
    asked = f"emea of {', '.join(map(str, members))}"
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise GraftError(f"{asked}, steps={steps!r}", "not a number of steps", "give 0 or more")
    if not math.isfinite(gamma):
        raise GraftError(f"{asked}, gamma={gamma!r}", "no finite number", "give the size of a step, such as 10")
    if model.training:
        raise GraftError(
            asked, "the model is in training", "call model.eval() first: dropout would be part of the entropy"
        )
    for e in (*members, *(() if behind is None else (as_expr(behind),))):
        for name in e.names():
            find(model, name)
    before = active(model)
    adapter = graft(model, Weighted(of=tuple(map(str, members))), mixed.by, head=False, seed=0)
    try:
        activate(model, A(mixed.by) if behind is None else A(mixed.by) >> behind)
        places: dict[str, Any] = adapter.parts[0].deltas
        _begin(places, _rows(batch, asked), len(members), start, asked)
        return _descend(model, places, batch, steps, gamma, mask, asked)
    finally:
        remove(model, mixed.by)
        activate(model, before)


def _free(model: nn.Module) -> str:
    """A name that no adapter has."""
    name = "emea"
    while name in adapters(model):
        name += "_"
    return name


def _rows(batch: Mapping[str, Any], asked: str) -> int:
    rows = max(
        (len(t) for t in batch.values() if isinstance(t, Tensor) and t.dim()), default=0
    )  # positions may be [1, seq]
    if not rows:
        raise GraftError(asked, "no tensor in the batch", "give what the model is called with, {'input_ids': ...}")
    return rows


def _begin(places: dict[str, Any], rows: int, n: int, start: Mapping[str, Tensor] | None, asked: str) -> None:
    """Give every place its logits [rows, n]."""
    if start is not None and start.keys() != places.keys():
        other = min(start.keys() ^ places.keys())
        raise GraftError(
            f"{asked}, start", f"{other} in one and not in the other", "give the logits of the same ensemble"
        )
    for key, delta in places.items():
        given = torch.full((1, n), 0.5) if start is None else start[key]
        if given.shape not in ((rows, n), (1, n)):
            found = f"{list(given.shape)} at {key}, where {rows} rows and {n} adapters are"
            raise GraftError(f"{asked}, start", found, f"give [{rows}, {n}] or [1, {n}]")
        delta.logits = nn.Parameter(given.detach().to(delta.logits).expand(rows, n).clone())


def _descend(
    model: nn.Module,
    places: dict[str, Any],
    batch: Mapping[str, Any],
    steps: int,
    gamma: float,
    mask: Tensor | None,
    asked: str,
) -> Ensemble:
    logits = [delta.logits for delta in places.values()]
    mask = batch.get("attention_mask") if mask is None else mask
    found = []
    for _ in range(steps):
        with torch.enable_grad():
            entropy = _entropy(model(**batch), mask, asked)
            slopes = torch.autograd.grad(entropy.sum(), logits, allow_unused=True)  # of its own row only
        found.append(entropy.detach())
        with torch.no_grad():
            for a, slope in zip(logits, slopes, strict=True):
                if slope is not None:  # a place that this input does not reach
                    a -= gamma * slope
    with torch.no_grad():
        output = model(**batch)
    entropy = torch.stack([*found, _entropy(output, mask, asked)])
    return Ensemble(output, entropy, {key: delta.logits.detach() for key, delta in places.items()})


def _entropy(output: Any, mask: Tensor | None, asked: str) -> Tensor:
    """H [batch] of logits [batch, (seq,) classes], the mean over the tokens that the mask [batch, seq] shows."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        found = f"an output of type {type(output).__name__} without logits [batch, (seq,) classes]"
        raise GraftError(asked, found, "give a model with a head, or an adapter with one behind")
    log_p = torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, -1)
    h = -(log_p.exp() * log_p).sum(-1)
    if h.dim() == 1:
        return h
    if mask is None:
        return h.mean(1)
    if mask.shape != h.shape:
        raise GraftError(asked, f"a mask {list(mask.shape)} for {list(h.shape)} tokens", "give [batch, seq]")
    shown = mask.to(h.dtype)
    return (h * shown).sum(1) / shown.sum(1).clamp(min=1)
