"""Sums of Kronecker products, sum_k A_k (x) B_k with A_k [p, m] and B_k [q, n], as [p q, m n] matrices or as linear maps.

Entry [(i, k), (j, l)] of A (x) B is A[i, j] B[k, l]. All indices are row-major: (A (x) B) vec(X) = vec(A X B^T), X [m, n].
"""

from __future__ import annotations

import math

from torch import Tensor


def kronecker_sum(a: Tensor, b: Tensor) -> Tensor:
    """sum_k a_k (x) b_k [*batch, p q, m n].  a [*batch, k, p, m], b [*batch, k, q, n].

    One product: the rearrangement R of the sum is sum_k vec(a_k) vec(b_k)^T (Van Loan and Pitsianis 1993).
    """
    (p, m), (q, n) = a.shape[-2:], b.shape[-2:]
    blocks = (a.flatten(-2).mT @ b.flatten(-2)).unflatten(-1, (q, n)).unflatten(-3, (p, m))  # [p, m, q, n]
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def rearranged(w: Tensor, p: int, m: int) -> Tensor:
    """R(W) [*batch, p m, q n] of W [*batch, p q, m n]: its row (i, j) is the block of W at i, j."""
    blocks = w.unflatten(-2, (p, -1)).unflatten(-1, (m, -1))  # [p, q, m, n]
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)


def kronecker_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y [..., p q] = (sum_k a_k (x) b_k) x, which is not formed.  x [..., m n], a [k, p, m], b [k, q, n]."""
    (k, p, m), (q, n) = a.shape, b.shape[-2:]
    t = x.reshape(-1, m, n) @ b.reshape(k * q, n).T  # [N, m, k q]
    if k > 1:
        t = t.view(-1, m, k, q).transpose(1, 2).reshape(-1, k * m, q)
    y = a.transpose(0, 1).reshape(p, k * m) @ t  # [N, p, q]
    return y.reshape(*x.shape[:-1], p * q)


def work_of(a: tuple[int, int], b: tuple[int, int], k: int = 1) -> int:
    """Multiply-adds of `kronecker_linear` for one x, k terms of these shapes."""
    (p, m), (q, n) = a, b
    return k * m * q * (n + p)


def factorized(d: int, most: int | None = None) -> tuple[int, int]:
    """(m, n) with m n = d: (most, d / most) where `most` divides d, otherwise the pair m <= n with the smallest sum and m <= most."""
    if most is not None and d % most == 0:
        return most, d // most
    limit = min(most or d, math.isqrt(d))
    m = next(m for m in range(limit, 0, -1) if d % m == 0)
    return m, d // m


def divisors(d: int) -> list[int]:
    """All of them, rising."""
    small = [m for m in range(1, math.isqrt(d) + 1) if d % m == 0]
    return sorted({*small, *(d // m for m in small)})
