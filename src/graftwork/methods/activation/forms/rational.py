"""A learned activation function: a quotient of two polynomials without poles.

Molina et al. 2020, "Padé Activation Units", arXiv 1907.06732, eq. 5 (the safe form), as in adaptable adapters.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from graftwork.core.initial import Initial, made, parameter

from .nonlinear import ACTIVATIONS

NEAR_ZERO = 1e-6  # |b| has no gradient at 0: a coefficient that started there would stay


class Rational(nn.Module):
    """F(x) = sum_{i<=p} a_i x^i / (1 + sum_{1<=j<=q} |b_j x^j|), elementwise.  numerator = a [p + 1], denominator = b [q].

    init: "one" the constant 1, or the name of an activation that a and b are fitted to on [-3, 3]; b then differs from that by
    up to 1e-6.
    """

    def __init__(self, p: int, q: int, init: str, like: Tensor) -> None:
        super().__init__()
        self.numerator = parameter((p + 1,), made(lambda: fitted(init, p, q)[0]), like)
        self.denominator = parameter((q,), _near(init, p, q), like)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.numerator.to(x.dtype), self.denominator.abs().to(x.dtype)
        size, above, below = x.abs(), a[-1], b[-1]
        for c in a[:-1].flip(0):
            above = above * x + c
        for c in b[:-1].flip(0):
            below = below * size + c
        return above / (1 + below * size)


def _near(init: str, p: int, q: int) -> Initial:
    def draw(t: Tensor, generator: torch.Generator | None) -> None:
        t.uniform_(-NEAR_ZERO, NEAR_ZERO, generator=generator).add_(fitted(init, p, q)[1])

    return draw


@functools.lru_cache
def fitted(init: str, p: int, q: int) -> tuple[Tensor, Tensor]:
    """a [p + 1] and b [q] >= 0 with a(x) - f(x) (b_1 |x| + ...) = f(x) by least squares; where b would be negative it is left out."""
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    y = torch.ones_like(x) if init == "one" else ACTIVATIONS[init](x)
    columns = [x**i for i in range(p + 1)] + [-y * x.abs() ** j for j in range(1, q + 1)]
    kept, solved = list(range(p + q + 1)), torch.zeros(p + q + 1, dtype=torch.float64)
    if init == "one":  # every b is as good as any other
        kept = kept[: p + 1]
    while True:
        matrix = torch.stack([columns[i] for i in kept], 1)
        solution = torch.linalg.lstsq(matrix, y[:, None], driver="gelsd").solution[:, 0]
        negative = {i for i, c in zip(kept, solution.tolist(), strict=True) if i > p and c < 0}
        if not negative:
            break
        kept = [i for i in kept if i not in negative]
    solved[kept] = solution
    return solved[: p + 1].float(), solved[p + 1 :].float()
