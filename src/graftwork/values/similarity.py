"""How alike two adapters are, by what they do to the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import GraftError
from ..expressions.algebra import Expr
from ..grafting.root import body_of
from .change import weighted_sum
from .places import places
from .terms import terms


@dataclass(frozen=True)
class Similarity:
    """cosine: of all changes together, in [-1, 1], 0 where one adapter changes nothing.  sites: of each weight that both change."""

    cosine: float
    sites: dict[str, float]


@torch.no_grad()
def similarity(model: nn.Module, a: str | Expr, b: str | Expr) -> Similarity:
    """cos(a, b) = sum_sites <dW_a, dW_b> / (|dW_a| |dW_b|), Frobenius; heads are left out.

    a, b: adapters, or expressions that are one change of each weight, as `combine` takes them.
    Of LoRAs by the factors: <B A, D C> = <B^T D, A C^T>; it does not depend on how dW is factored.
    Raises GraftError for methods that change activations.
    """
    asked = f"the similarity of {str(a)!r} and {str(b)!r}"
    pair = [terms(model, e, asked) for e in (a, b)]
    found = places([adapter for _, adapter in (pair[0] | pair[1]).values()], body_of(model), asked)
    inner, size, sites = 0.0, [0.0, 0.0], {}
    for place in found.matrices:
        mine = [[(w, place.change(n)) for n, (w, _) in one.items() if n in place.chains] for one in pair]
        changes = [weighted_sum(some) if some else None for some in mine]
        squares = [0.0 if change is None else change.inner(change) for change in changes]
        size = [whole + square for whole, square in zip(size, squares, strict=True)]
        if changes[0] is not None and changes[1] is not None:
            product = changes[0].inner(changes[1])
            inner += product
            sites[place.site.key] = _cosine(product, *squares)
    for place in found.vectors:
        shifts = [[w * place.shift(n) for n, (w, _) in one.items() if n in place.chains] for one in pair]
        totals: list[Tensor | None] = [torch.stack(some).sum(0) if some else None for some in shifts]
        size = [whole + (0.0 if t is None else float(t.square().sum())) for whole, t in zip(size, totals, strict=True)]
        if totals[0] is not None and totals[1] is not None:
            inner += float((totals[0] * totals[1]).sum())
    if not found.matrices and not found.vectors:
        raise GraftError(asked, "nothing but heads", "compare adapters that change the backbone")
    return Similarity(_cosine(inner, *size), sites)


def _cosine(inner: float, square_a: float, square_b: float) -> float:
    size = math.sqrt(max(square_a, 0.0) * max(square_b, 0.0))
    return max(-1.0, min(1.0, inner / size)) if size else 0.0
