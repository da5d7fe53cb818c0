"""Small numbers as bytes: n codes of b bits in ceil(n b / 8) bytes, the first in the highest bits. A mask has one bit an entry."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def packed(codes: Tensor, bits: int = 1) -> Tensor:
    """The bytes (uint8) of codes below 2^bits."""
    flat = codes.flatten().cpu().to(torch.uint8)
    flat = (flat[:, None] >> _falling(bits) & 1).flatten()
    return (nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8) << _falling(8)).sum(1, dtype=torch.uint8)


def unpacked(stored: Tensor, shape: torch.Size, bits: int = 1) -> Tensor | None:
    """The codes (uint8), bool for one bit; None where the bytes do not fit the shape."""
    n = shape.numel()
    if stored.dtype != torch.uint8 or stored.numel() != -(-n * bits // 8):
        return None
    flat = (stored.cpu()[:, None] >> _falling(8) & 1).flatten()[: n * bits]
    if bits == 1:
        return flat.view(shape) != 0
    return (flat.view(n, bits) << _falling(bits)).sum(1, dtype=torch.uint8).view(shape)


def _falling(bits: int) -> Tensor:
    return torch.arange(bits - 1, -1, -1, dtype=torch.uint8)
