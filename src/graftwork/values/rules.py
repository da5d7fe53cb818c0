"""Rules that merge several changes of one weight entry by entry, and the angle between two.

Yadav et al. 2023 (TIES), Yu et al. 2023 (DARE), Shoemake 1985 (slerp).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .change import Change


def keep_largest(tensors: Sequence[Tensor], density: float) -> list[Tensor]:
    """The round(density n) entries of largest magnitude among all n of these tensors, the others zero.

    Of equal magnitudes the first are kept, so exactly as many remain whatever the values are.
    """
    sizes = [t.abs().flatten() for t in tensors]
    n = sum(s.numel() for s in sizes)
    k = round(density * n)
    if k in (0, n):
        return [t if k else torch.zeros_like(t) for t in tensors]
    every = torch.cat(sizes)
    threshold = float(
        np.partition(every.numpy(), n - k)[n - k]
    )  # torch's kthvalue takes 100 times as long on low-rank values
    keep = every > threshold
    equal = (every == threshold).nonzero().flatten()
    keep[equal[: k - int(keep.sum())]] = True
    parts = keep.split([t.numel() for t in tensors])
    return [t * part.view_as(t) for t, part in zip(tensors, parts, strict=True)]


def elect(tensors: Sequence[Tensor], weights: Sequence[float], majority: str = "total") -> Tensor:
    """Steps 2 and 3 of TIES: entry by entry the mean of the w_e t_e that have the elected sign.

    majority: the sign of sum_e w_e t_e ("total"), of sum_e sign(w_e t_e) ("frequency"), or of sum_e t_e ("unweighted", as
    HF PEFT elects, where a negative weight votes for the wrong side); 0 counts as +. Zeros are in no mean.
    """
    t = torch.stack(list(tensors))
    wt = torch.stack([w * one for w, one in zip(weights, tensors, strict=True)])
    votes = t if majority == "unweighted" else wt
    sign = torch.where((votes.sign() if majority == "frequency" else votes).sum(0) >= 0, 1.0, -1.0)
    agree = votes.sign() == sign
    return (wt * agree).sum(0) / agree.sum(0).clamp_min(1)


def drop(t: Tensor, density: float, seed: int, *of: str) -> Tensor:
    """DARE: each entry is kept with probability `density` and divided by it, so that the mean stays.

    of: what the draw belongs to (adapter, site); the same draw on every machine and device.
    """
    text = "\n".join((str(seed), *of))
    own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    keep = torch.rand(t.shape, generator=torch.Generator().manual_seed(own), dtype=torch.float64) < density
    return t * keep / density


def slerp(a: Change, b: Change, t: float) -> tuple[float, float]:
    """(p, q) of p a + q b at the share t of the angle w between a and b: sin((1 - t) w) / sin w and sin(t w) / sin w.

    1 - t and t where one is zero, or where they are so nearly (anti)parallel that the arc is not determined.
    """
    size = math.sqrt(max(a.inner(a), 0.0) * max(b.inner(b), 0.0))
    cosine = a.inner(b) / size if size else 1.0
    if abs(cosine) > 1 - 1e-6:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
