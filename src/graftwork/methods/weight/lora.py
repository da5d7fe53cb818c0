"""LoRA: a low-rank update of a frozen weight.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3:  W' = W + (alpha / r) B A
rsLoRA (Kalajdzievski 2023) scales by alpha / sqrt(r) instead; PiSSA (Meng et al. 2024), OLoRA (Büyükakyüz 2024) and the
minor components of URAE (Yu et al. 2025) start inside of W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, fraction, number, positive, rank, where
from graftwork.core.initial import kaiming_uniform, normal, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.lowrank import low_rank

from .forms.residual import Residual, joined, require_rank
from .forms.starts import Pair, initials, minor, orthonormal, principal


@method("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """W' = W + s B A,  A [r, in],  B [out, r],  s = alpha / r.  Identity at init (B = 0); mergeable.

    r: rank.  alpha: s = alpha / r, or alpha / sqrt(r) with rslora.  dropout: on the input of A, in training only.
    bias: the bias is adapted too, b' = b + s c, c [out] (HF PEFT's lora_bias); where the host has none, b is zero.
    init: "kaiming" A kaiming-uniform (a = sqrt 5), B and c zero; on an embedding A zero, B N(0, 1).
        The others start inside of W and own a frozen second term, W' = W + s (B A - B_0 A_0), so that W stays as it is:
        "pissa" s B_0 A_0 is the best approximation of W of rank r · "minor" its r smallest singular triples · "olora"
        B_0, A_0 the first r columns of Q and rows of R, W = Q R. In a file such an adapter is the plain LoRA
        [B, -B_0][A; A_0] of rank 2 r, for any reader; with resume=True it is what it was.
    niter: "pissa" by a randomised decomposition with so many subspace iterations, in the place of the exact one.
    Parameters: r (in + out) per weight, and out with bias.  Source: Hu et al. 2021, arXiv 2106.09685, eq. 3 and loralib.
    When: the default: best understood, merges away, fast, every tool reads its files.
    """

    r: int = rank(8)
    alpha: float = number(16.0)
    dropout: float = fraction(0.0)
    rslora: bool = flag(False)
    bias: bool = flag(False)
    init: str = choice("kaiming", "kaiming", "pissa", "olora", "minor")
    niter: int | None = positive(None)
    at: str = where("q, v | linear | conv")

    mergeable = True

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "kaiming" and (self.bias or self.alpha <= 0):
            found = "a bias, or an alpha that is not above zero, has no place inside of W"
            raise GraftError(f"{self}", found, "leave bias out, and give alpha > 0")
        if self.init != "pissa" and self.niter is not None:
            raise GraftError(f"{self}", "niter is of init='pissa'", "leave niter out")

    def build(self, site: Site, part: Part) -> LowRank | Residual:
        site.weight.require_matrix("lora", self.dropout)
        if self.init != "kaiming":
            require_rank(self, site.weight, self.r, site.key)
            return Residual(site.weight, self.r, self.scale, self.dropout, *initials(site, self.start))
        if self.bias and (site.weight.bias is None or site.weight.batch):
            found = f"{type(site.module).__name__}, which has no place for one"
            raise GraftError(f"{self} at {site.key}: a bias", found, "leave bias out for these sites")
        return LowRank(self, site)

    def start(self, w: Tensor, generator: torch.Generator | None) -> Pair:
        """(A_0, B_0) of a weight w [*batch, out, in]."""
        if self.init == "olora":
            return orthonormal(w, self.r)
        if self.init == "minor":
            return minor(w, self.r, self.scale)
        return principal(w, self.r, self.scale, self.niter, generator)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        if self.init == "kaiming":
            return super().fold(part)
        plain = replace(self, r=2 * self.r, alpha=2 * self.r * self.scale, rslora=False, init="kaiming", niter=None)
        return plain, joined(part), {}

    def count(self, site: Site) -> int:
        w = site.weight
        return w.copies * self.r * (w.d_in + w.d_out) + (w.d_out if self.bias else 0)


class LowRank(WeightDelta):
    """down = A [*batch, r, in], up = B [*batch, out, r], shift = c [out] or None."""

    lasting = True

    def __init__(self, method: LoRA, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.down = w.parameter(method.r, w.d_in, zeros if w.lookup else kaiming_uniform())
        self.up = w.parameter(w.d_out, method.r, normal() if w.lookup else zeros)
        self.shift = w.vector(w.d_out, zeros) if method.bias else None
        self.scale, self.dropout = method.scale, method.dropout

    def bias(self, b: Tensor | None) -> Tensor | None:
        if self.shift is None:
            return b
        shift: Tensor = self.scale * self.shift
        return shift if b is None else b + shift

    def overrides(self, function: str) -> bool:
        return self.shift is not None if function == "bias" else super().overrides(function)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.scale * self.up

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y = low_rank(x, base, host, self.down, self.up, self.scale, self.dropout if self.training else 0.0)
        return y if self.shift is None else torch.add(y, self.shift.to(y.dtype), alpha=self.scale)
