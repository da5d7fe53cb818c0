"""Whether a tensor holds finite numbers only, in one pass over it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def finite(t: Tensor) -> bool:
    """No infinity and no NaN. A sum keeps either; where the sum itself is too large, every number is looked at."""
    if not t.is_floating_point():
        return True
    if t.dtype.itemsize == 1:  # 8-bit floats have no sums
        t = t.float()
    return math.isfinite(t.detach().sum(dtype=None if t.dtype.itemsize > 2 else torch.float32)) or bool(
        torch.isfinite(t).all()
    )
