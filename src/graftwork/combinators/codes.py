"""Numbers rounded to 2^bits levels for N(0, 1) (see `quantised`)."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 500
_BOOKS: dict[int, list[float]] = {}  # numbers, not a call, are what a compiled pass finds here


def levels(bits: int) -> Tensor:
    """2^bits rising levels for N(0, 1) [2^bits], float64: each is the median of its cell, whose bounds lie halfway between levels."""
    if bits not in _BOOKS:
        shares = torch.linspace(0, 1, 2**bits + 1, dtype=torch.float64, device="cpu")
        found = torch.special.ndtri((shares[1:] + shares[:-1]) / 2)
        for _ in range(ROUNDS):
            found = step(found)
        _BOOKS[bits] = found.tolist()
    return torch.tensor(_BOOKS[bits], dtype=torch.float64, device="cpu")


def step(found: Tensor) -> Tensor:
    """One round of the iteration whose fixed point the levels are."""
    inner = torch.special.ndtr((found[1:] + found[:-1]) / 2)
    shares = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
    return torch.special.ndtri((shares[1:] + shares[:-1]) / 2)


def coded(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (uint8), mu and s [*batch, 1, 1], and (w - mu) / (s + 1e-5), of w [*batch, rows, columns]; the reals at least float32."""
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    mu, s = w.mean((-2, -1), keepdim=True), w.std((-2, -1), keepdim=True)
    unit = (w - mu) / (s + 1e-5)
    book = levels(bits).to(unit)
    return torch.bucketize(unit.detach(), (book[1:] + book[:-1]) / 2).to(torch.uint8), mu, s, unit


def decoded(codes: Tensor, mu: Tensor, s: Tensor, bits: int) -> Tensor:
    """q s + mu."""
    return levels(bits).to(s)[codes.long()] * s + mu
