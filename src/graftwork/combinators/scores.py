"""Scores of the entries of an adapter's matrices, and the mask that keeps the largest (see `sparse`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.errors import GraftError
from graftwork.core.initial import normal, tensor

from .masked import Masked

Group = list[tuple[Tensor, Masked, str]]  # scores, delta and name of the matrices that are ranked together


def instant(deltas: Sequence[Masked], by: str, scope: str) -> list[dict[str, Tensor]]:
    """Scores that need no data: "magnitude" or "random", per delta and matrix, on the CPU."""
    scores = [{n: None if by == "random" else _magnitude(w) for n, w in d.matrices().items()} for d in deltas]
    told = [z.flatten() for named in scores for z in named.values() if z is not None]
    pool = torch.cat(told) if told and scope == "global" else None
    return [
        {n: _drawn(d.matrices()[n], pool) if z is None else z for n, z in s.items()}
        for d, s in zip(deltas, scores, strict=True)
    ]


def _magnitude(w: Tensor) -> Tensor | None:
    """|w|; None where it tells nothing: a matrix that starts constant, or has no values."""
    if w.is_meta:
        return None
    size = w.detach().abs().float().cpu()
    kept = size[size > 0]
    return size if kept.numel() and kept.max() > kept.min() else None


def _drawn(w: Tensor, pool: Tensor | None) -> Tensor:
    """Random scores, from the adapter's generator; with a pool, of the same distribution as those it holds."""
    z = tensor(tuple(w.shape), normal())
    if pool is None:
        return z
    ranks = z.flatten().argsort().argsort() * len(pool) // z.numel()
    return pool.sort().values[ranks].view(z.shape)


def pooled(deltas: Sequence[Masked], scores: Sequence[dict[str, Tensor]], scope: str) -> Iterator[Group]:
    """The matrices that are ranked together: all of them, or each by itself."""
    every = []
    for delta, named in zip(deltas, scores, strict=True):
        for name, w in delta.matrices().items():
            z = named.get(name)  # no gradient reached it: the loss does not feel it
            every.append((torch.zeros(w.shape) if z is None else z.float().cpu(), delta, name))
    if scope == "global":
        yield every
    else:
        yield from ([one] for one in every)


def keep(group: Group, share: float, data: bool) -> None:
    """Write masks that keep the `share` of the entries with the largest scores; what was pruned before stays pruned.

    GraftError for scores from data that are all equal, or not finite.
    """
    z = torch.cat([scores.flatten() for scores, _, _ in group])
    old = torch.cat([_before(delta.mask(name)) for _, delta, name in group])
    alive = z[old]
    if not torch.isfinite(alive).all():
        raise GraftError(
            "the scores of the pruned matrices", "numbers that are not finite", "calibrate with another loss or batch"
        )
    if data and share < 1 and alive.max() == alive.min():
        raise GraftError(
            "the scores of the pruned matrices",
            f"all {len(alive):,} are equal ({float(alive[0]):.3g})",
            "start from matrices that are not zero (init='houlsby'), train a step first, or use by='magnitude'",
        )
    kept = len(z) - int((1 - share) * len(z) + 1e-9)
    order = torch.where(old, z, -torch.inf).argsort(descending=True, stable=True)
    new = torch.zeros_like(old)
    new[order[:kept]] = True
    for (scores, delta, name), mask in zip(group, new.split([s.numel() for s, _, _ in group]), strict=True):
        delta.take(name, mask.view(scores.shape))


def _before(mask: Tensor) -> Tensor:
    return torch.ones(mask.numel(), dtype=torch.bool) if mask.is_meta else mask.flatten().cpu()


def grasp_loss(model: nn.Module, batch: Any, t: float = 200.0) -> Tensor:
    """The classification loss with logits / t, as GraSP's gradients want it: gw.calibrate(model, batches, grasp_loss).

    It is derived twice: load the backbone with attn_implementation="eager".
    """
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return F.cross_entropy(logits.flatten(0, -2) / t, batch["labels"].flatten())


def synflow_loss(model: nn.Module, batch: Any) -> Tensor:
    """R of SynFlow, the sum of the outputs on an input of ones, shaped as the batch: gw.calibrate(model, [batch],
    synflow_loss)."""
    out = model(**{k: torch.ones_like(v) for k, v in batch.items() if k != "labels"})
    return out.logits.sum()
