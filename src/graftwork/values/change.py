"""A change of one weight, dW = W' - W: dense, or as thin factors. Everything is float64 on the CPU, whatever the model is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..products import spectrum
from ..products.spectrum import Spectrum


@dataclass(frozen=True)
class Change:
    """dW [*batch, out, in]: `matrix`, or up down where it is thin, [*batch, out, r] and [*batch, r, in]."""

    down: Tensor | None = None
    up: Tensor | None = None
    matrix: Tensor | None = None

    @property
    def thin(self) -> tuple[Tensor, Tensor] | None:
        """(down, up), if it is known as such."""
        return None if self.down is None or self.up is None else (self.down, self.up)

    @property
    def r(self) -> int | None:
        """The rank of its factors."""
        return None if self.down is None else self.down.shape[-2]

    @cached_property
    def dense(self) -> Tensor:
        """dW itself."""
        if self.matrix is not None:
            return self.matrix
        assert self.up is not None and self.down is not None
        return self.up @ self.down

    @cached_property
    def spectrum(self) -> Spectrum:
        """Its singular values and vectors; by the small factors where r (r the rank) is less than either side."""
        if self.thin is not None and self.thin[0].shape[-2] <= min(self.thin[0].shape[-1], self.thin[1].shape[-2]):
            return spectrum.of_factors(*self.thin)
        return spectrum.of_matrix(self.dense)

    @property
    def too_large(self) -> bool:
        """Whether it is a dense one whose factors would be larger than itself."""
        if self.matrix is None:
            return False
        d_out, d_in = self.matrix.shape[-2:]
        return self.spectrum.needed * (d_out + d_in) > d_out * d_in

    def inner(self, other: Change) -> float:
        """The sum of the products of their entries; of thin ones by the factors: <B A, D C> = <B^T D, A C^T>."""
        if self.thin is not None and other.thin is not None:
            (a, b), (c, d) = self.thin, other.thin
            return float(((b.mT @ d) * (a @ c.mT)).sum())
        return float((self.dense * other.dense).sum())


def weighted_sum(terms: Iterable[tuple[float, Change]]) -> Change:
    """sum_e w_e dW_e: the factors side by side, [w_1 A_1; w_2 A_2 ...] and [B_1, B_2 ...], or dense if one is."""
    terms = list(terms)
    pairs = [(w, change.thin) for w, change in terms]
    if all(pair is not None for _, pair in pairs):
        known = [(w, *pair) for w, pair in pairs if pair is not None]
        down = torch.cat([w * a for w, a, _ in known], dim=-2)
        return Change(down, torch.cat([b for _, _, b in known], dim=-1))
    total = torch.zeros_like(terms[0][1].dense)
    for w, change in terms:
        total = total + w * change.dense
    return Change(matrix=total)
