"""LoRA of which only one side learns: a random frozen A does as well as a trained one.

Zhu et al. 2024, "Asymmetry in Low-Rank Adapters of Foundation Models", section 4.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, count, fraction, number, rank, where
from graftwork.core.initial import Initial, drawing_from, kaiming_uniform, tensor, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.residual import require_rank
from .forms.starts import gaussian_qr, weight_at


@method("asymmetry_lora")
@dataclass(frozen=True)
class AsymmetryLoRA(Method):
    """W' = W + s B E A,  A [r, in], E [r, r], B [out, r],  s = alpha / r; what is not trained is frozen at its initial value.

    train: "up" B (the method: as good as LoRA, at half the cost for the same r) · "down" A (worse, the claim's other half) ·
        "both" (LoRA, started otherwise) · "middle" E, which starts at the identity; without it there is no E.
    init_down of A, init_up of B: "rand" orthonormal rows of A, columns of B, the QR of a Gaussian · "svd" the r largest
        singular vectors of W (rows of A: right ones; columns of B: left ones) · "kaiming" uniform, a = sqrt 5 · "zero".
    Identity at init where one of them is zero; otherwise the start differs from W by s B A.
    seed: what is frozen and random is drawn from it, for each site by its name, and is in no file; "svd" is in the file.
    dropout: on the input of A, in training only.  Mergeable.
    Parameters: r out per weight (train="up"), r in ("down"), r (in + out) ("both"), r r ("middle").
    Source: Zhu et al. 2024, arXiv 2402.16842, section 4.1 and table 1 (whose code takes columns for the rows of V^T).
    When: half of LoRA's parameters shall do, or gradients to the inputs' side are dear; with random A it also bounds better how
        far the model can overfit.
    """

    r: int = rank(8)
    alpha: float = number(16.0)
    train: str = choice("up", "up", "down", "both", "middle")
    init_down: str = choice("rand", "rand", "svd", "kaiming", "zero")
    init_up: str = choice("zero", "zero", "svd", "rand", "kaiming")
    dropout: float = fraction(0.0)
    seed: int = count(0)
    at: str = where("q, v | linear | conv")

    mergeable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        zero = {side for side in ("down", "up") if getattr(self, f"init_{side}") == "zero"}
        if zero == {"down", "up"} or zero - set(self.trained):
            found = (
                f"{' and '.join(sorted(zero))} zero, of which {' and '.join(self.trained)} trained: nothing would learn"
            )
            raise GraftError(f"{self}", found, "start at zero at most one factor, which is trained")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Whether B A starts at zero."""
        return "zero" in (self.init_down, self.init_up)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the trained tensors."""
        return ("down", "up") if self.train == "both" else (self.train,)

    def build(self, site: Site, part: Part) -> OneSided:
        site.weight.require_matrix("asymmetry_lora", self.dropout)
        if {self.init_down, self.init_up} & {"rand", "svd"}:
            require_rank(self, site.weight, self.r, site.key)
        return OneSided(self, site)

    def count(self, site: Site) -> int:
        w = site.weight
        sizes = {"down": w.d_in, "up": w.d_out, "middle": self.r}
        return w.copies * self.r * sum(sizes[name] for name in self.trained)


class OneSided(WeightDelta):
    """down = A [*batch, r, in], up = B [*batch, out, r], middle = E [*batch, r, r] or None; parameters or frozen buffers."""

    lasting = True
    down: Tensor
    up: Tensor

    def __init__(self, method: AsymmetryLoRA, site: Site) -> None:
        super().__init__()
        w, r = site.weight, method.r
        self.scale, self.dropout = method.alpha / r, method.dropout
        for name, shape in (("down", (*w.batch, r, w.d_in)), ("up", (*w.batch, w.d_out, r))):
            kind = getattr(method, f"init_{name}")
            init = _initial(kind, name, site, r)
            if name in method.trained:
                self.register_parameter(name, nn.Parameter(tensor(shape, init, w.like)))
            elif kind == "svd":
                self.register_buffer(name, tensor(shape, init, w.like))
            else:
                with drawing_from(_generator(method.seed, f"{site.key}/{name}")):
                    self.register_buffer(name, tensor(shape, init, w.like), persistent=False)
        self.middle = w.parameter(r, r, lambda t, _: t.copy_(torch.eye(r))) if method.train == "middle" else None

    def factors(self) -> tuple[Tensor, Tensor]:
        up = self.up if self.middle is None else self.up @ self.middle
        return self.down, self.scale * up


def _generator(seed: int, name: str) -> torch.Generator:
    """One for each name: what a site draws depends on no other."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _initial(kind: str, name: str, site: Site, r: int) -> Initial:
    rows = name == "down"

    def svd(t: Tensor, generator: torch.Generator | None) -> None:
        u, _, v = torch.linalg.svd(weight_at(site), full_matrices=False)
        t.copy_(v[..., :r, :] if rows else u[..., :r])

    known: dict[str, Initial] = {"zero": zeros, "kaiming": kaiming_uniform(), "svd": svd, "rand": gaussian_qr(rows)}
    return known[kind]
