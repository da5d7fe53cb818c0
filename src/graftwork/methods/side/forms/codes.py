"""Values kept as uniform codes of a few bits, several to a byte."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Codes(NamedTuple):
    """packed uint8: values in low + step * (0, 1, ... 2^bits - 1), `shape` of them, 8 / bits in each byte."""

    packed: Tensor
    low: Tensor
    step: Tensor
    shape: torch.Size


def pack(values: Tensor, bits: int, low: Tensor | float, high: Tensor | float) -> Codes:
    """The nearest of 2^bits values from low to high, for each value."""
    low, high = torch.as_tensor(low), torch.as_tensor(high)
    low, high = (t.to(values.device, torch.float32) for t in (low, high))
    step = (high - low).clamp_min(1e-12) / (2**bits - 1)
    codes = ((values.float() - low) / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten()
    each = 8 // bits
    codes = F.pad(codes, (0, -codes.numel() % each)).view(-1, each)
    packed = codes[:, 0].clone()
    for i in range(1, each):
        packed |= codes[:, i] << (bits * i)
    return Codes(packed, low, step, values.shape)


def unpack(codes: Codes, bits: int, dtype: torch.dtype) -> Tensor:
    """The values that `pack` kept."""
    each = 8 // bits
    parts = [(codes.packed >> (bits * i)) & (2**bits - 1) for i in range(each)]
    flat = torch.stack(parts, 1).flatten()[: codes.shape.numel()]
    return (flat.float() * codes.step + codes.low).to(dtype).view(codes.shape)
