"""LoKr: the update is the Kronecker product of a small matrix and a larger one, which may be of low rank.

Yeh et al. 2024, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", section 3; rules of shapes and
ranks: KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import choice, flag, fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.weight import Weight

from .forms.dropouts import Dropouts
from .forms.factor import Factor
from .forms.formed import is_thin
from .forms.kronecker import factorized, kronecker_linear, kronecker_sum, work_of


@dataclass(frozen=True)
class Shapes:
    """Of W1 [out_l, in_m] and W2 [out_k, in_n, *kernel] at one weight, and which of them are products of rank r."""

    out_l: int
    out_k: int
    in_m: int
    in_n: int
    kernel: tuple[int, ...]
    left_low: bool
    right_low: bool
    core: bool


@method("lokr")
@dataclass(frozen=True)
class LoKr(Method):
    """W' = W + s W1 (x) W2,  s = alpha / r,  (x) the Kronecker product.  Identity at init; mergeable.

    W1 [out_l, in_m], W2 [out_k, in_n], of a convolution [out_k, in_n, *kernel] with in that of a group. out = out_l out_k and
    in = in_m in_n are the pairs (m <= n) with the smallest sum, m at most `decompose_factor`, or (decompose_factor, rest) where it
    divides.
    r: W2 = B2 A2 of rank r where r < max(out_k, in_n) / 2, otherwise whole; with decompose_both W1 = B1 A1 where
        r < max(out_l, in_m) / 2.
    effective: B2 A2 of a convolution with a kernel larger than 1 is sum_{p, q} t[p, q] B2[o, p] A2[q, i], t [r, r, *kernel].
    rank_dropout, module_dropout: see `Dropouts`; rank_dropout_scale: rows that are left make up for the others.
    init: "zero" W1 (or B1) zero; "lycoris" W2 (or A2) zero; the rest kaiming-uniform (a = sqrt 5).
    Parameters per weight: out_l in_m (or r (out_l + in_m)), and out_k in_n |kernel|, or r (out_k + in_n |kernel|), or
    r (out_k + in_n) + r^2 |kernel|.  Source: Yeh et al. 2024, arXiv 2309.14859; KohakuBlueleaf/LyCORIS.
    When: the smallest files of the LyCORIS family; the update has full rank in a fixed Kronecker form.
    """

    r: int = positive(8)
    alpha: float = number(8.0)
    decompose_factor: int | None = positive(None)
    decompose_both: bool = flag(False)
    effective: bool = flag(False)
    rank_dropout: float = fraction(0.0)
    rank_dropout_scale: bool = flag(False)
    module_dropout: float = fraction(0.0)
    init: str = choice("zero", "zero", "lycoris")
    at: str = where("q, v | linear | conv")

    mergeable = True
    lr = 5e-3

    def build(self, site: Site, part: Part) -> Kronecker:
        site.weight.require_matrix("lokr")
        return Kronecker(self, site.weight)

    def shapes(self, w: Weight) -> Shapes:
        """What this weight is divided into."""
        kernel = w.kernel
        out_l, out_k = factorized(w.d_out, self.decompose_factor)
        in_m, in_n = factorized(w.d_in // math.prod(kernel), self.decompose_factor)
        right_low = self.r < max(out_k, in_n) / 2
        left_low = self.decompose_both and self.r < max(out_l, in_m) / 2
        core = self.effective and right_low and math.prod(kernel) > 1
        return Shapes(out_l, out_k, in_m, in_n, kernel, left_low, right_low, core)

    def count(self, site: Site) -> int:
        d, r = self.shapes(site.weight), self.r
        k = math.prod(d.kernel)
        left = r * (d.out_l + d.in_m) if d.left_low else d.out_l * d.in_m
        low = r * (d.out_k + d.in_n) + r * r * k if d.core else r * (d.out_k + d.in_n * k)
        return site.weight.copies * (left + (low if d.right_low else d.out_k * d.in_n * k))


class Kronecker(WeightDelta):
    """left: W1 [*batch, out_l, in_m];  right: W2 [*batch, out_k, in_n |kernel|]."""

    lasting = True

    def __init__(self, method: LoKr, w: Weight) -> None:
        super().__init__()
        d, zero = method.shapes(w), method.init == "zero"
        left, right = (method.r if low else None for low in (d.left_low, d.right_low))
        self.left = Factor(w, d.out_l, d.in_m, left, (), False, "up" if zero else "")
        self.right = Factor(w, d.out_k, d.in_n, right, d.kernel, d.core, "" if zero else "down")
        self.sizes = (d.out_l, d.in_m), (d.out_k, d.in_n * math.prod(d.kernel))
        self.scale = method.alpha / method.r
        self.dropouts = Dropouts(method.rank_dropout, method.rank_dropout_scale, method.module_dropout)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(W1 [*batch, 1, out_l, in_m], s W2 [*batch, 1, out_k, in_n |kernel|])."""
        return self.left.matrix().unsqueeze(-3), (self.scale * self.right.matrix()).unsqueeze(-3)

    def update(self) -> Tensor:
        return self.dropouts.of_rows(kronecker_sum(*self.pair()), self)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        if not is_thin(self.work(), self.view.shape):
            return super().linear(x, base, host)
        y, edit = base(x), kronecker_linear(x, *self.pair())
        keep = self.dropouts.kept(self, edit)
        return torch.add(y, (edit if keep is None else edit * keep).to(y.dtype))

    def work(self) -> int:
        return work_of(*self.sizes)
