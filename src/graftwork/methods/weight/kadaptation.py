"""KAdaptation: the update is a sum of Kronecker products of small matrices that all layers share and low-rank ones of each layer.

He et al. 2023, "Parameter-Efficient Model Adaptation for Vision Transformers", section 3.3 and eric-ai-lab/PEViT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import flag, fraction, number, positive, where
from graftwork.core.initial import parameter, uniform, xavier_uniform, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.dropout import drop


@method("kadaptation")
@dataclass(frozen=True)
class KAdaptation(Method):
    """W' = W + c (sum_{i<t} S_i (x) U_i V_i^T)^T,  S_i = P_i Q_i^T [t, t],  U_i [in / t, r],  V_i [out / t, r],  b' = b + shift.

    Identity at init (U, shift zero); mergeable. (x) is the Kronecker product; of rank t slow_rank fast_rank at most.
    P, Q [t, t, slow_rank], the slow weights: one pair for all sites of a role;  U, V, the fast ones: of each site.
    t: number of terms and size of S_i; divides in and out.  scale: c.  bias: shift [out], one for the sites of a layer that have a
        bias of that size.  update_dropout: on the entries of the update, in training only.
    Init: P, Q U(-0.01, 0.01), U zero, V xavier-uniform. (The published code zeroes U and V, which then never move, and gives v the Q
    of q; neither is copied.)
    Parameters: t fast_rank (in / t + out / t) per weight, 2 t^2 slow_rank for each role, d per layer.
    Source: He et al. 2023, arXiv 2203.16329, eq. 3 to 6.
    When: vision backbones and small data, where LoRA's parameters shall be cut again.
    """

    t: int = positive(32)
    slow_rank: int = positive(1)
    fast_rank: int = positive(1)
    scale: float = number(160.0)
    update_dropout: float = fraction(0.5)
    bias: bool = flag(True)
    at: str = where("q, v | linear | conv")

    mergeable = True
    sized_by = ("fast_rank",)

    def build(self, site: Site, part: Part) -> Shared:
        w = site.weight
        w.require_matrix("kadaptation")
        if w.d_out % self.t or w.d_in % self.t:
            found = f"a weight of {w.d_out} x {w.d_in}, which t = {self.t} does not divide"
            raise GraftError(f"{self} at {site.key}", found, "choose t that divides both")
        slow = part.shared(f"slow {site.role}", lambda: Slow(self, w.like))
        place = self.shift_of(site)
        shift = None if place is None else part.shared(place, lambda: Shift(w.d_out, w.like))
        return Shared(self, site, slow, shift)

    def shift_of(self, site: Site) -> str | None:
        """The name of the shift that a site shares with those of its layer, None where its host has no place for a bias."""
        w = site.weight
        return f"shift {site.tower} {site.layer} {w.d_out}" if self.bias and w.bias and not w.batch else None

    def count(self, site: Site) -> int:
        w = site.weight
        return w.copies * self.fast_rank * (w.d_in + w.d_out)

    def count_shared(self, sites: Sequence[Site]) -> int:
        shifts = {self.shift_of(site): site.weight.d_out for site in sites}
        shifts.pop(None, None)
        return 2 * self.t**2 * self.slow_rank * len({site.role for site in sites}) + sum(shifts.values())


class Slow(nn.Module):
    """left = P, right = Q [t, t, slow_rank]."""

    def __init__(self, method: KAdaptation, like: Tensor | None) -> None:
        super().__init__()
        shape, init = (method.t, method.t, method.slow_rank), uniform(-0.01, 0.01)
        self.left, self.right = parameter(shape, init, like), parameter(shape, init, like)


class Shift(nn.Module):
    """value [out]."""

    def __init__(self, d: int, like: Tensor | None) -> None:
        super().__init__()
        self.value = parameter((d,), zeros, like)


class Shared(WeightDelta):
    """down = U [*batch, t, in / t, r], up = V [*batch, t, out / t, r]; the slow weights and the shift of the layer."""

    lasting = True

    def __init__(self, method: KAdaptation, site: Site, slow: Slow, shift: Shift | None) -> None:
        super().__init__()
        w, t, r = site.weight, method.t, method.fast_rank
        self.down = parameter((*w.batch, t, w.d_in // t, r), zeros, w.like)
        self.up = parameter((*w.batch, t, w.d_out // t, r), xavier_uniform(), w.like)
        self.scale, self.entries = method.scale, method.update_dropout
        self._slow = (slow,)  # in tuples: they hang at the model's root, once
        self._shift = () if shift is None else (shift,)

    def sources(self) -> Iterator[nn.Module]:
        yield from (self, *self._slow, *self._shift)

    @property
    def shift(self) -> Tensor | None:
        """[out], or None."""
        return self._shift[0].value if self._shift else None

    @property
    def dropping(self) -> bool:
        """Whether this pass drops entries of the update, which then has no factors. What is merged is whole."""
        return self.entries > 0 and self.training and self.runtime.open

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A [*batch, n, in], B [*batch, out, n]) of sum_i (Q_i (x) V_i) (P_i (x) U_i)^T, column by column."""
        (slow,) = self._slow
        down = torch.einsum("ipa,...iur->...iarpu", slow.left, self.down).flatten(-2).flatten(-4, -2)
        up = torch.einsum("ipa,...iur->...puiar", slow.right, self.up).flatten(-3).flatten(-3, -2)
        return down, self.scale * up

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.dropping else self.pair()

    def update(self) -> Tensor:
        down, up = self.pair()
        return drop(up @ down, self.entries, self.dropping)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return self.shift if b is None else b if self.shift is None else b + self.shift

    def overrides(self, function: str) -> bool:
        if function == "bias":
            return self.shift is not None
        return not (function == "factors" and self.entries) and super().overrides(function)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y = super().linear(x, base, host)
        return y if self.shift is None else torch.add(y, self.shift.to(y.dtype))

    def work(self) -> int:
        return 0  # of rank t: a thin update
