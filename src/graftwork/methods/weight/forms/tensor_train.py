"""A matrix in tensor-train form: Oseledets 2011, "Tensor-Train Decomposition"; for adapters Yang et al. 2024 (see `loretta`)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from graftwork.core.initial import normal, parameter, zeros

# of the paper's matrices [rows, columns]; transposed matrices take them backwards
PUBLISHED = {
    (4096, 64): (16, 16, 16, 4, 4, 4),
    (768, 64): (8, 8, 12, 8, 8),
    (8, 4096): (16, 16, 8, 4, 4),
    (8, 768): (8, 8, 12, 8),
}
LARGEST = 16  # factor of a size, where it has no larger prime


def factors(n: int, k: int | None = None) -> tuple[int, ...]:
    """n as a product of k factors of about one size, or of as few as are at most 16 (or prime)."""
    primes, p, rest = [], 2, n
    while p * p <= rest:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    primes += [rest] if rest > 1 else []
    for size in (k,) if k is not None else range(1, len(primes) + 2):
        bins = [1] * size
        for prime in reversed(primes):
            bins[bins.index(min(bins))] *= prime
        if k is not None or max(bins) <= max([LARGEST, *primes]):
            break
    return tuple(sorted(bins, reverse=True))


def shape_of(rows: int, columns: int, cores: int | None = None) -> tuple[int, ...]:
    """n_1 ... n_K with product rows * columns: K = cores of about one size, or the published ones, or those of the rows before
    those of the columns.
    """
    if cores is not None:
        return factors(rows * columns, cores)
    known = PUBLISHED.get((rows, columns)) or PUBLISHED.get((columns, rows), ())[::-1]
    return known or (*(n for n in factors(rows) if n > 1), *(n for n in factors(columns) if n > 1)) or (1,)


def count(shape: tuple[int, ...], r: int) -> int:
    """Numbers in the cores: sum_i r_{i-1} n_i r_i."""
    return sum(a * n * b for n, (a, b) in zip(shape, pairwise(ranks(shape, r)), strict=True))


def ranks(shape: tuple[int, ...], r: int) -> tuple[int, ...]:
    """r_0 ... r_K: 1 at both ends, r inside."""
    return (1, *[r] * (len(shape) - 1), 1)


class TensorTrain(nn.Module):
    """M [*batch, rows, columns], M.view(n_1, ..., n_K)[j_1, ..., j_K] = G_1[:, j_1] G_2[:, j_2] ... G_K[:, j_K].

    Cores G_i [*batch, r_{i-1}, n_i, r_i].  Init: G_i = N(0, 1) / sqrt(r_i) sd^(1/K), sd^2 = 1 / (rows + columns): so each
    number of M has the variance sd^2, whatever the ranks.  zero: the last core is zero instead, and M with it, while the
    gradient still reaches that core.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        shape: tuple[int, ...],
        r: int,
        like: Tensor | None,
        batch: tuple[int, ...] = (),
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.batch = rows, columns, batch
        ends, spread = ranks(shape, r), (rows + columns) ** (-0.5 / len(shape))
        self.cores = nn.ParameterList()
        for i, (n, (a, b)) in enumerate(zip(shape, pairwise(ends), strict=True)):
            last = i == len(shape) - 1
            init = zeros if zero and last else normal(spread / math.sqrt(b))
            self.cores.append(parameter((*batch, a, n, b), init, like))
        sizes = [math.prod(shape[:i]) for i in range(len(shape) + 1)]
        self.border = sizes.index(rows) if rows in sizes and not batch else None  # cores of the rows

    def matrix(self) -> Tensor:
        """M."""
        out = None
        for core in self.cores:
            if out is None:
                out = core.flatten(-3, -2)  # [*batch, n_1, r_1]
                continue
            out = (out @ core.flatten(-2)).reshape(*self.batch, -1, core.shape[-1])
        assert out is not None
        return out.reshape(*self.batch, self.rows, self.columns)

    def forward(self, x: Tensor) -> Tensor:
        """x M [..., columns] for x [..., rows], by the cores of the rows and then those of the columns, where they can be told apart."""
        if self.border is None:
            return x @ self.matrix().to(x.dtype)
        n = x.shape[:-1].numel()
        h = x.reshape(n, self.rows)
        for core in self.cores[
            : self.border
        ]:  # bmm and mm: what `@` chooses depends on whether a core is trained, and so do its bits
            turned = core.flatten(0, 1).t().expand(n, -1, -1)
            h = torch.bmm(turned, h.reshape(n, turned.shape[-1], -1))
        for core in self.cores[self.border :]:
            h = torch.mm(h.reshape(-1, core.shape[0]), core.flatten(1))
        return h.reshape(*x.shape[:-1], self.columns)
