"""EigenLoRAx: a new task learns only the coordinates of its LoRA in the principal subspace of earlier ones.

Kaushik et al. 2025, "EigenLoRAx: Recycling Adapters to Find Principal Subspaces for Resource-Efficient Adaptation and
Inference", algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import count, fraction, positive, where
from graftwork.core.initial import kaiming_uniform, tensor, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.residual import require_rank
from .forms.starts import gaussian_qr


@method("eigenlorax")
@dataclass(frozen=True)
class EigenLoRAx(Method):
    """W' = W + P_B L_B (P_A L_A)^T,  P_A [in, K], P_B [out, K] frozen, P^T P = I,  L_A, L_B [K, r] trained,  K = k + extra.

    `gw.recycle(model, "new", of=["a", "b", ...])` makes such an adapter from finished ones: k principal directions of their
    factors at each site, and `extra` random ones orthogonal to these, for what they did not need. Grafted by itself, all
    directions are random. `gw.project` writes a finished LoRA in the coordinates of such an adapter.
    dropout: on the input, in training only.  The bases are in every file with the coordinates.
    Init: L_A kaiming-uniform (a = sqrt 5), L_B zero: the identity (the published code draws both from U(-0.5, 0.5)).
    Parameters: 2 K r per weight.  Mergeable.  Source: Kaushik et al. 2025, arXiv 2502.04700, algorithm 1.
    When: many finished LoRAs of related tasks exist and new ones shall cost a few hundred numbers.
    """

    r: int = positive(8)
    k: int = positive(32)
    extra: int = count(32)
    dropout: float = fraction(0.0)
    at: str = where("q, v | linear")

    mergeable = True
    lr = 5e-3

    def build(self, site: Site, part: Part) -> Coordinates:
        site.weight.require_matrix("eigenlorax", self.dropout)
        require_rank(self, site.weight, self.k + self.extra, site.key)
        return Coordinates(self, site)

    def count(self, site: Site) -> int:
        return site.weight.copies * 2 * (self.k + self.extra) * self.r


class Coordinates(WeightDelta):
    """down = L_A^T [*batch, r, K], up = L_B [*batch, K, r];  basis_down = P_A^T [*batch, K, in], basis_up = P_B [*batch, out, K]."""

    lasting = True
    basis_down: Tensor
    basis_up: Tensor

    def __init__(self, method: EigenLoRAx, site: Site) -> None:
        super().__init__()
        w, size = site.weight, method.k + method.extra
        self.down, self.up = w.parameter(method.r, size, kaiming_uniform()), w.parameter(size, method.r, zeros)
        self.register_buffer("basis_down", tensor((*w.batch, size, w.d_in), gaussian_qr(rows=True), w.like))
        self.register_buffer("basis_up", tensor((*w.batch, w.d_out, size), gaussian_qr(rows=False), w.like))
        self.dropout = method.dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down @ self.basis_down, self.basis_up @ self.up
