"""LoRETTA_rep: a LoRA whose two factors are in tensor-train form.

Yang et al. 2024, "LoRETTA: Low-Rank Economic Tensor-Train Adaptation for Ultra-Low-Parameter Fine-Tuning of Large
Language Models", arXiv 2402.11417, section 3.3; yifanycc/loretta.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import choice, fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.tensor_train import TensorTrain, count, shape_of


@method("loretta_rep")
@dataclass(frozen=True)
class LoRETTARep(Method):
    """W' = W + (alpha / r) B A,  A^T [in, r] and B^T [r, out] tensor trains of rank tt_rank.  Identity at init with
    "zero"; mergeable.

    r, alpha, dropout: as of LoRA.  tt_rank: the inner ranks of the trains.
    cores: in how many cores each factor is; None: as published, or factors of both sizes of at most 16; 1 is plain LoRA.
    init: every core as `tensor_train` says; "zero" makes the last core of B zero, "released" does not, as the authors'
        code, whose first pass is not the backbone's.
    Parameters: sum_i r_{i-1} n_i r_i of both; 800 for [8, 4096] at tt_rank 5.
    When: a low-rank update whose factors are stored as tensor trains, for the smallest file at a given width.
    """

    r: int = positive(8)
    alpha: float = number(16.0)
    tt_rank: int = positive(5)
    cores: int | None = positive(None)
    dropout: float = fraction(0.0)
    init: str = choice("zero", "zero", "released")
    at: str = where("q, v | linear | conv")

    mergeable = True
    sized_by = ("tt_rank",)
    lr = 1e-2

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """No factor is zero in the released initial values."""
        return self.init == "zero"

    def shapes(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """n_1 ... n_K of A^T and of B^T."""
        w = site.weight
        return shape_of(w.d_in, self.r, self.cores), shape_of(self.r, w.d_out, self.cores)

    def build(self, site: Site, part: Part) -> TrainedFactors:
        site.weight.require_matrix("loretta_rep", self.dropout)
        return TrainedFactors(self, site)

    def count(self, site: Site) -> int:
        return site.weight.copies * sum(count(shape, self.tt_rank) for shape in self.shapes(site))


class TrainedFactors(WeightDelta):
    """down = A^T, up = B^T."""

    lasting = True

    def __init__(self, method: LoRETTARep, site: Site) -> None:
        super().__init__()
        w, (first, second) = site.weight, method.shapes(site)
        zero = method.init == "zero"
        self.down = TensorTrain(w.d_in, method.r, first, method.tt_rank, w.like, w.batch)
        self.up = TensorTrain(method.r, w.d_out, second, method.tt_rank, w.like, w.batch, zero)
        self.scale, self.dropout = method.alpha / method.r, method.dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down.matrix().mT, self.scale * self.up.matrix().mT
