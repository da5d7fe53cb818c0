"""y = x (W + U)^T + b for a frozen W and a U of which few numbers are trained: their gradient is computed, the dense one never.

The sum W + U is made in either direction (as many additions as W has numbers, against N times as many multiply-adds of the
product itself) and not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.plan import Host
from graftwork.products.dropout import traced
from graftwork.products.lowrank import whole_update


class Places(Protocol):
    """Where the trained numbers stand in a [out, in] matrix."""

    def into(self, w: Tensor, values: Tensor) -> Tensor:
        """w with the values added at their places."""

    def seen(self, x: Tensor) -> Tensor:
        """What the values are multiplied with, of x [..., in]: kept for the backward pass."""

    def gradient(self, g: Tensor, seen: Tensor) -> Tensor:
        """g^T x at the places: of the values, from the gradient g [N, out] and what was seen [N, ...]."""


def partial_update(
    x: Tensor,
    base: Callable[[Tensor], Tensor],
    host: Host,
    values: Tensor,
    places: Places,
    frozen: Tensor | None = None,
) -> Tensor:
    """base(x) + x U^T, U [out, in] being `frozen` (or zero) with the values at their places."""
    if traced() or not host.frozen_product or torch.is_autocast_enabled(x.device.type):
        at = torch.zeros_like(host.weight) if frozen is None else frozen
        return whole_update(x, base, host, places.into(at, values))
    return PartialProduct.apply(x, host.weight, frozen, host.bias, values, places.seen(x), places)


class PartialProduct(torch.autograd.Function):
    """The product, its gradient for x and for the values, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        frozen: Tensor | None,
        bias: Tensor | None,
        values: Tensor,
        seen: Tensor,
        places: Places,
    ) -> Tensor:
        ctx.save_for_backward(weight, frozen, values, seen)
        ctx.places = places
        return F.linear(x, _sum(weight, frozen, values, places), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, frozen, values, seen = ctx.saved_tensors
        g_x = g_values = None
        if ctx.needs_input_grad[0]:
            g_x = grad @ _sum(weight, frozen, values, ctx.places)
        if ctx.needs_input_grad[4]:
            g_values = ctx.places.gradient(grad.reshape(-1, grad.shape[-1]), seen.reshape(-1, seen.shape[-1]))
        return g_x, None, None, None, g_values, None, None


def _sum(weight: Tensor, frozen: Tensor | None, values: Tensor, places: Places) -> Tensor:
    values = values.to(weight.dtype)  # W + U, U first: what a file holds of U gives the same bits
    return places.into(weight, values) if frozen is None else weight + places.into(frozen, values)
