"""Rotation of a weight's input by a block-diagonal orthogonal matrix: the Cayley transform, and the product."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = 32  # blocks smaller than this are multiplied by several at a time: a product of tiny matrices is all overhead


def cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 for skew-symmetric blocks Q [.., b, b], at least in float32: orthogonal, the identity for Q = 0."""
    q = skew.to(torch.promote_types(skew.dtype, torch.float32))
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye - q, eye + q).to(skew.dtype)  # the two commute


def side_by_side(blocks: Tensor, k: int) -> Tensor:
    """Blocks [.., n, b, b] as n / k block-diagonal ones [.., n / k, k b, k b]."""
    b = blocks.shape[-1]
    eye = torch.eye(k, dtype=blocks.dtype, device=blocks.device)[:, None, :, None]
    return (blocks.unflatten(-3, (-1, k))[..., None, :] * eye).flatten(-4, -3).flatten(-2) if k > 1 else blocks[..., :b]


def turn(x: Tensor, blocks: Tensor) -> Tensor:
    """x blockdiag(R_1 .. R_n) for x [.., d] and blocks [n, b, b] with n b = d, or for w [*batch, rows, d] and [*batch, n, b, b]."""
    n, b = blocks.shape[-3], blocks.shape[-1]
    flat = x if blocks.dim() > 3 else x.reshape(-1, x.shape[-1])
    parts = flat.unflatten(-1, (n, b)).transpose(-3, -2)  # [*batch, n, rows, b], not copied
    return (parts @ blocks.to(x.dtype)).transpose(-3, -2).reshape(x.shape)


def joined(blocks: Tensor) -> Tensor:
    """The same block-diagonal matrix in blocks that are worth a product each."""
    n, b = blocks.shape[-3], blocks.shape[-1]
    return side_by_side(blocks, max([1, *(k for k in range(2, WIDE // b + 1) if n % k == 0)]))


def turned_weight(w: Tensor, blocks: Tensor, lookup: bool) -> Tensor:
    """W blockdiag(R)^T: what takes x to W (R^T x), so that x^T W'^T = (x^T R) W^T; of an embedding [d, vocab], whose columns are the
    vectors e, those of e R."""
    return turn(w.mT, blocks).mT if lookup else turn(w, blocks.mT)
