"""Derivatives of the non-linearities, and the ranges they stay in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Slope(NamedTuple):
    """A function with its derivative, and the range of that."""

    value: Callable[..., Tensor]
    derivative: Callable[[Tensor], Tensor]
    low: float
    high: float


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _silu(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


SLOPES = {
    "gelu": Slope(F.gelu, _gelu, -0.13, 1.13),
    "gelu_tanh": Slope(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh, -0.13, 1.13),
    "silu": Slope(F.silu, _silu, -0.1, 1.1),
    "relu": Slope(F.relu, lambda x: (x > 0).to(x.dtype), 0.0, 1.0),  # one bit is exact
}
