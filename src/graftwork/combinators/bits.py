"""A mask as bits: eight entries in a byte, the first in the highest bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLACES = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)


def packed(mask: Tensor) -> Tensor:
    """Eight entries in a byte."""
    flat = nn.functional.pad(mask.flatten().cpu(), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) * _PLACES).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor | None:
    """The mask; None where the bytes do not fit the shape."""
    n = shape.numel()
    if bits.dtype != torch.uint8 or bits.numel() != (n + 7) // 8:
        return None
    return ((bits.cpu()[:, None] & _PLACES) != 0).flatten()[:n].view(shape)
