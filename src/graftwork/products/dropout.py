"""Dropout on a CPU at a fraction of its usual cost: 16 random bits a number in the place of a 53-bit uniform, one byte a number kept."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def drop(x: Tensor, p: float, training: bool = True) -> Tensor:
    """m x / share: m = 0 with probability p, else 1, drawn for each number; share is the probability of a 1. x itself where not training.

    On a CPU two to ten times as fast as F.dropout, which it is elsewhere and where the pass is compiled or transformed.
    """
    if not (p and training):
        return x
    if traced() or x.device.type != "cpu":
        return F.dropout(x, p)
    keep, share = keep_mask(x, p)
    return torch.mul(x, keep).div_(share)


def keep_mask(like: Tensor, p: float) -> tuple[Tensor, float]:
    """What dropout keeps (1 with probability 1 - p, else 0), shaped as `like`, and the exact probability of it.

    On a CPU the probability is a multiple of 1 / 65,536, which the returned value accounts for.
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - p), 1 - p
    n = like.numel()
    seed = int(torch.empty((), dtype=torch.int64).random_())
    raw = np.random.SFC64(seed).random_raw((n + 3) // 4)  # twice as fast as torch's own generator
    words = torch.from_numpy(raw).view(torch.int16)[:n]
    dropped = min(max(round(p * 65536), 1), 65535)
    least = dropped - 32768  # of the words that keep
    keep = (
        words.clamp_(least - 1, least).sub_(least - 1).to(torch.uint8)
    )  # comparisons and bool are several times slower
    return keep.view(like.shape), 1 - dropped / 65536


def traced() -> bool:
    """Whether the pass is compiled, or transformed by torch.func: then the plain formula is what they work best on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
