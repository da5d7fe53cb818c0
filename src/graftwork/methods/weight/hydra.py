"""Hydra: two low-rank branches at one weight, a parallel one on its input and a sequential one on its output.

Kim et al. 2023, "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning", arXiv 2309.06922, eq. 4
to 8; extremebird/Hydra. Biases of the branches are those of its vision code. The merge there reads tensors of another
module, and its code for language never calls the branches: here both are the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, count, flag, number, where
from graftwork.core.initial import Initial, kaiming_uniform, normal, xavier_uniform, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.weight import Weight
from graftwork.products.lowrank import low_rank

from .forms.biases import require_bias

INITIAL: dict[str, Initial] = {"xavier": xavier_uniform(), "kaiming": kaiming_uniform(), "normal": normal(0.02)}


@method("hydra")
@dataclass(frozen=True)
class Hydra(Method):
    """y = y0 + s (B_p (A_p x + a_p) + b_p) + s (B_s (A_s y0 + a_s) + b_s),  y0 = W x + b.  Identity at init (B, b_p,
    b_s = 0); mergeable.

    A_p [r_p, in], B_p [out, r_p] in parallel; A_s [r_s, out], B_s [out, r_s] in sequence: they see y0 without the
    parallel term. As a weight, W' = W + s (B_p A_p + B_s A_s W) and b' = b + s (B_p a_p + b_p + B_s (A_s b + a_s) + b_s).
    r_parallel, r_sequential: r_p and r_s; without the second it is LoRA, without the first W' = (I + s B_s A_s) W.
    scale: s.  bias: a and b of both branches; a host without a bias then gets one.
    init: of A: "xavier" uniform (vision), "kaiming" uniform with a = sqrt 5 (language), "normal" N(0, 0.02^2) (CLIP).
    Parameters: r_p (in + out) + 2 r_s out per weight, and r_p + r_s + 2 out with bias.
    When: new features beside pretrained ones (parallel) and new mixtures of them (sequential) are both wanted, mergeable in
        linear layers.
    """

    r_parallel: int = count(2)
    r_sequential: int = count(2)
    scale: float = number(0.1)
    bias: bool = flag(True)
    init: str = choice("xavier", *INITIAL)
    at: str = where("o, down | linear | conv")

    mergeable = True
    sized_by = ("r_parallel", "r_sequential")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.r_parallel + self.r_sequential:
            raise GraftError(f"{self}", "no branch", "give r_parallel or r_sequential")

    def build(self, site: Site, part: Part) -> TwoHeads:
        w = site.weight
        w.require_matrix("hydra")
        if self.bias:
            require_bias(f"{self}: a bias", site, "set bias=False for these sites")
        return TwoHeads(self, w)

    def count(self, site: Site) -> int:
        w, branches = site.weight, ((self.r_parallel, site.weight.d_in), (self.r_sequential, site.weight.d_out))
        return w.copies * sum(r * (d + w.d_out) + (r + w.d_out if self.bias else 0) for r, d in branches if r)


class Head(nn.Module):
    """down = A [*batch, r, d], up = B [*batch, out, r], inner = a [*batch, r], outer = b [*batch, out] (None: zero)."""

    def __init__(self, method: Hydra, w: Weight, r: int, d: int) -> None:
        super().__init__()
        self.down = w.parameter(r, d, INITIAL[method.init])
        self.up = w.parameter(w.d_out, r, zeros)
        self.inner = w.vector(r, zeros) if method.bias else None
        self.outer = w.vector(w.d_out, zeros) if method.bias else None

    def shift(self, given: Tensor | None) -> Tensor | None:
        """B (A given + a) + b [*batch, out] for a vector `given` [*batch, d], None for zero."""
        inside = None if given is None else (self.down @ given[..., None])[..., 0]
        if self.inner is None or self.outer is None:
            return None if inside is None else (self.up @ inside[..., None])[..., 0]
        inside = self.inner if inside is None else inside + self.inner
        return self.outer + (self.up @ inside[..., None])[..., 0]


class TwoHeads(WeightDelta):
    """parallel, sequential: the branches, None where one has rank 0."""

    lasting = True

    def __init__(self, method: Hydra, w: Weight) -> None:
        super().__init__()
        self.parallel = Head(method, w, method.r_parallel, w.d_in) if method.r_parallel else None
        self.sequential = Head(method, w, method.r_sequential, w.d_out) if method.r_sequential else None
        self.scale = method.scale

    def pair(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """W' = W + s up down: (down [*batch, r_p + r_s, in], up [*batch, out, r_p + r_s]), since A_s y0 is A_s W x and a constant."""
        pairs: list[tuple[Tensor, Tensor]] = []
        if self.parallel is not None:
            pairs.append((self.parallel.down, self.parallel.up))
        if self.sequential is not None:
            pairs.append((self.sequential.down @ w, self.sequential.up))
        return (
            pairs[0]
            if len(pairs) == 1
            else (torch.cat([a for a, _ in pairs], -2), torch.cat([b for _, b in pairs], -1))
        )

    def shift(self, b: Tensor | None) -> Tensor | None:
        """(b' - b) / s [*batch, out]."""
        parallel = None if self.parallel is None else self.parallel.shift(None)
        sequential = None if self.sequential is None else self.sequential.shift(b)
        return parallel if sequential is None else sequential if parallel is None else parallel + sequential

    def weight(self, w: Tensor) -> Tensor:
        down, up = self.pair(w)
        return w + self.scale * (up @ down)

    def bias(self, b: Tensor | None) -> Tensor | None:
        shift = self.shift(b)
        if shift is None:
            return b
        return self.scale * shift if b is None else b + self.scale * shift

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y = low_rank(x, base, host, *self.pair(host.weight), self.scale)
        shift = self.shift(host.bias)
        return y if shift is None else torch.add(y, shift.to(y.dtype), alpha=self.scale)

    def work(self) -> int:
        s = self.sequential
        return 0 if s is None else s.down.shape[-2] * math.prod(self.view.shape)  # A_s W, once a call
