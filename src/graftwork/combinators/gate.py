"""The gate of `gated`: how much of a method an example gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.initial import normal, parameter, uniform, zeros
from graftwork.core.passes import Runtime, token_mean

if TYPE_CHECKING:
    from .gated import Gated


class Gate(nn.Module):
    """weight = w [1, d], bias = b [1]."""

    def __init__(self, method: Gated, d: int, like: Tensor) -> None:
        super().__init__()
        near = uniform(-(d**-0.5), d**-0.5)
        plain = method.init == "normal"
        self.weight = parameter((1, d), normal(method.init_std) if plain else near, like)
        self.bias = parameter((1,), zeros if plain else near, like)
        self.real = method.tokens == "real"

    def forward(self, x: Tensor, runtime: Runtime) -> Tensor:
        """g [batch, 1, ...] for x [batch, ..., d]."""
        flat = F.linear(
            x.reshape(-1, x.shape[-1]), self.weight, self.bias
        )  # on more axes, other bits when weights are frozen
        return token_mean(torch.sigmoid(flat).reshape(*x.shape[:-1], 1), runtime, self.real)

    def added(self, runtime: Runtime, x: Tensor, y: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """y + g change(x, y)."""
        return y + self(x, runtime) * change(x, y)
