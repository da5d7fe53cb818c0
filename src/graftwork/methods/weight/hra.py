"""HRA: the input of a weight goes through a chain of trained Householder reflections.

Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
eq. 4 to 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, number, positive, where
from graftwork.core.initial import Initial
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.multiplied import Multiplied, Pair, width


@method("hra")
@dataclass(frozen=True)
class HRA(Method):
    """W' = W R,  R = H_1 ... H_r,  H_i = I - 2 u_i u_i^T,  u_i = U[:, i] / |U[:, i]|,  U [in, r].  Mergeable.

    Identity at init for an even r: the columns start in equal pairs, whose reflections cancel.  r: number of reflections.
    gram_schmidt: the columns are made orthonormal, V, and R = I - 2 V V^T, which is the identity for no U.
    init: "pairs" or "random" (kaiming-uniform columns); None takes pairs where they can be had.
    penalty: times ||I - V^T V||^2 of the normalised columns of each weight, in the training loss (the paper's lambda; 0
        leaves them free, and gram_schmidt is its limit).
    An embedding is rotated at its vectors, a convolution at its flattened filters.
    Parameters: r in per weight.  Source: Yuan et al. 2024, arXiv 2405.17484; DaShenZi721/HRA.
    When: an orthogonal change with LoRA's count of parameters; close to oft in what it keeps, cheaper to store, r reflections in
        sequence dearer to run.
    """

    r: int = positive(8)
    gram_schmidt: bool = flag(False)
    penalty: float = number(0.0, low=0.0)
    init: str | None = choice(None, None, "pairs", "random")
    at: str = where("q, v | linear | conv")

    mergeable = True
    lr = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "pairs" and (self.gram_schmidt or self.r % 2):
            found = "orthonormal columns have no equal pairs" if self.gram_schmidt else "an odd number of reflections"
            raise GraftError(f"{self}", f"{found}: R is not the identity at init", "leave init out, or take an even r")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Whether the columns start in equal pairs."""
        return not (self.init == "random" or self.gram_schmidt or self.r % 2)

    def build(self, site: Site, part: Part) -> Reflections:
        site.weight.require_matrix("hra")
        if self.r > (size := width(site.weight)):
            raise GraftError(f"{self} at {site.key}", f"an input of {size} numbers", f"choose r <= {size}")
        return Reflections(self, site)

    def count(self, site: Site) -> int:
        return site.weight.copies * self.r * width(site.weight)


class Reflections(Multiplied):
    """columns = U [*batch, in, r]."""

    def __init__(self, method: HRA, site: Site) -> None:
        super().__init__(method.r)
        w = site.weight
        self.columns = w.parameter(width(w), method.r, _columns(method.identity))
        self.lookup, self.orthonormal, self.penalty = w.lookup, method.gram_schmidt, method.penalty

    def chain(self) -> Pair:
        """P [*batch, in, r] and Q [*batch, r, in] with R = I + P Q: the compact form I - V T V^T of a product of reflections,
        T^-1 the upper triangle of V^T V with halves on its diagonal."""
        wide = self.columns.to(torch.promote_types(self.columns.dtype, torch.float32))
        if self.orthonormal:  # the reflection at a subspace depends on no basis of it
            v = torch.linalg.qr(wide).Q
            p = -2 * v
        else:
            v = F.normalize(wide, dim=-2)
            inverse = (v.mT @ v).triu(1) + torch.eye(v.shape[-1], dtype=v.dtype, device=v.device) / 2
            p = -torch.linalg.solve_triangular(inverse, v, upper=True, left=False)
        return p.to(self.columns.dtype), v.mT.to(self.columns.dtype)

    def right(self) -> Pair | None:
        return None if self.lookup else self.chain()

    def left(self) -> Pair | None:
        if not self.lookup:
            return None
        p, q = self.chain()
        return q.mT, p.mT

    def auxiliary_loss(self) -> Tensor | None:
        if not self.penalty:
            return None
        v = F.normalize(self.columns, dim=-2)
        off = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device) - v.mT @ v
        return self.penalty * off.square().sum()


def _columns(paired: bool) -> Initial:
    """U(-b, b) with b = 1 / sqrt(number of different columns): kaiming-uniform with a = sqrt(5), as in the authors' code."""

    def fill(t: Tensor, generator: torch.Generator | None) -> None:
        different = t.shape[-1] // 2 if paired else t.shape[-1]
        drawn = t.new_empty(*t.shape[:-1], different).uniform_(-(different**-0.5), different**-0.5, generator=generator)
        t.copy_(drawn.repeat_interleave(2, -1) if paired else drawn)

    return fill
