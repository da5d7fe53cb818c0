"""What bottlenecks are made of, by the names that configurations use: non-linearities, and how D and U start."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.initial import Initial, kaiming_uniform, normal, truncated_normal, zeros

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "none": lambda h: h,
}


def starts(init: str, std: float) -> tuple[Initial, Initial]:
    """The initial values of the down and up projections."""
    return {
        "lora": (kaiming_uniform(), zeros),
        "houlsby": (truncated_normal(std), truncated_normal(std)),
        "bert": (normal(std), normal(std)),
        "zero_up": (normal(std), zeros),
    }[init]
