"""The order of hidden units means nothing: the units of one delta put where those of another are nearest to them.

He et al. 2023, "MerA: Merging Pretrained Adapters For Few-Shot Learning": T minimises <T, C> over T >= 0 with rows and
columns that add up to 1 / m, C_ij the distance of unit i of one from unit j of the other by their weights. Such a
minimum is attained at a permutation divided by m (Birkhoff), which is found exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import torch
from torch import Tensor

from ..core.delta import Delta
from ..methods.activation.bottleneck import Residual
from ..methods.weight.lora import LowRank


def plan(cost: Tensor) -> Tensor:
    """T [m, m] of a cost C [m, m]: the exact optimal transport between uniform marginals."""
    from scipy.optimize import linear_sum_assignment

    m = cost.shape[0]
    rows, columns = linear_sum_assignment(cost.numpy())
    out = torch.zeros_like(cost)
    out[torch.as_tensor(rows), torch.as_tensor(columns)] = 1 / m
    return out


@singledispatch
def units(delta: Delta) -> tuple[dict[str, int], tuple[str, ...]]:
    """({tensor: its axis of hidden units}, the tensors that a unit is told by); empty for a delta without hidden units."""
    return {}, ()


@units.register
def _(delta: Residual) -> tuple[dict[str, int], tuple[str, ...]]:
    return {"down": 0, "down_bias": 0, "up": 1}, ("down", "down_bias")


@units.register
def _(delta: LowRank) -> tuple[dict[str, int], tuple[str, ...]]:
    batch = delta.down.dim() - 2
    return ({"down": 0, "up": 1}, ("down",)) if not batch else ({}, ())


def aligned(anchor: Mapping[str, Tensor], other: Mapping[str, Tensor], delta: Delta) -> dict[str, Tensor]:
    """The tensors of `other` with its hidden units in the order of the anchor's: P D, P b, U P^T with P = m T."""
    axes, told_by = units(delta)
    out = dict(other)
    if not axes:
        return out
    mine, theirs = (
        torch.cat([t[n].reshape(t[n].shape[0], -1) for n in told_by if n in t], dim=1) for t in (anchor, other)
    )
    order = plan(torch.cdist(mine, theirs)).argmax(1)
    return out | {n: out[n].index_select(axis, order) for n, axis in axes.items() if n in out}
