"""MoKA: the update is a gated sum of Kronecker products whose factors differ in shape.

"MoKA: Mixture of Kronecker Adapters", 2025 (the Kronecker adapters, not the mixture of experts of that name nor MokA for several
modalities).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, positive, where, words
from graftwork.core.initial import kaiming_uniform, ones, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.weight import Weight

from .forms.formed import is_thin
from .forms.kronecker import divisors, kronecker_linear, kronecker_sum, work_of

Shape = tuple[int, int]


@method("moka_kron")
@dataclass(frozen=True)
class MoKAKron(Method):
    """W' = W + sum_{i<r} g_i A_i (x) B_i,  A_i [a_i, b_i],  B_i [out / a_i, in / b_i],  g = softmax(gate).  Identity at init; mergeable.

    r: terms.  shapes: the [a, b] of the A_i as texts such as "64x64", taken in turn; by default the five that cost the fewest
        parameters, nearly square ones first: those with a b near sqrt(out in), so that A and B are of one size.
    gate: "softmax" of trained numbers that start at 1, or "uniform", g_i = 1 / r.
    fixed: MoKA_s; A_i = I of size a, which divides both widths, is fixed, and A_i (x) B_i block-diagonal with equal blocks.
    Init: A_i kaiming-uniform (a = sqrt 5), B_i zero.
    Parameters: sum_i (a_i b_i + (out / a_i) (in / b_i)) + r per weight, without a_i b_i for MoKA_s, without r for a uniform gate.
    With these shapes those of q and v are the published 5.2 M of LLaMA2-7B and 3.9 M of LLaMA3-8B. The published runs keep the
    backbone in 4 bits, which is the backbone's business.  Source: arXiv 2508.
    When: the count of parameters shall be free of the widths' ratio: a mixture of Kronecker products of several shapes.
    """

    r: int = positive(10)
    shapes: tuple[str, ...] = words()
    gate: str = choice("softmax", "softmax", "uniform")
    fixed: bool = flag(False)
    at: str = where("q, v | linear | conv")

    mergeable = True
    lr = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        bad = [text for text in self.shapes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text)]
        if bad or (any(a != b for a, b in self._given()) and self.fixed):
            found = ", ".join(bad) or "an identity that is not square"
            raise GraftError(
                f"MoKAKron(shapes={self.shapes!r})", found, 'give texts such as "64x32", rows by columns of A'
            )

    def _given(self) -> list[Shape]:
        return [(int(a), int(b)) for a, _, b in (text.partition("x") for text in self.shapes)]

    def shapes_of(self, w: Weight) -> list[Shape]:
        """The shape of each A_i at this weight."""
        chosen = self._given() or balanced(w.d_out, w.d_in, 5, square=self.fixed)
        return [chosen[i % len(chosen)] for i in range(self.r)]

    def build(self, site: Site, part: Part) -> Mixed:
        w = site.weight
        w.require_matrix("moka_kron")
        bad = [f"{a} x {b}" for a, b in self.shapes_of(w) if w.d_out % a or w.d_in % b]
        if bad:
            found = f"a weight of {w.d_out} x {w.d_in}, which blocks of {bad[0]} do not divide"
            raise GraftError(
                f"{self} at {site.key}", found, "choose shapes that divide both, or leave them to the default"
            )
        return Mixed(self, w)

    def count(self, site: Site) -> int:
        w = site.weight
        sizes = [(0 if self.fixed else a * b) + (w.d_out // a) * (w.d_in // b) for a, b in self.shapes_of(w)]
        return w.copies * (sum(sizes) + (self.r if self.gate == "softmax" else 0))


def balanced(d_out: int, d_in: int, most: int, square: bool) -> list[Shape]:
    """The shapes [a, b] of A, a | out and b | in, for which A and B have the fewest numbers together; of equals the squarest first."""
    pairs = [(a, b) for a in divisors(d_out) for b in divisors(d_in) if a == b or not square]
    return sorted(pairs, key=lambda s: (s[0] * s[1] + d_out * d_in // (s[0] * s[1]), abs(math.log(s[0] / s[1])), s))[
        :most
    ]


class Mixed(WeightDelta):
    """left.i = A_i [*batch, a_i, b_i], right.i = B_i [*batch, out / a_i, in / b_i], gate [*batch, r] before the softmax."""

    lasting = True

    def __init__(self, method: MoKAKron, w: Weight) -> None:
        super().__init__()
        self.shapes = method.shapes_of(w)
        fixed, gated = method.fixed, method.gate == "softmax"
        self.left = nn.ParameterList([] if fixed else [w.parameter(a, b, kaiming_uniform()) for a, b in self.shapes])
        self.right = nn.ParameterList(w.parameter(w.d_out // a, w.d_in // b, zeros) for a, b in self.shapes)
        self.gate = w.vector(method.r, ones) if gated else None

    def terms(self) -> list[tuple[Tensor, Tensor]]:
        """(A_i [*batch, k, a, b], g_i B_i [*batch, k, out / a, in / b]) of the k terms of each shape."""
        right = list(self.right)
        like = right[0]
        left = list(self.left) or [torch.eye(a, dtype=like.dtype, device=like.device) for a, _ in self.shapes]
        if self.gate is None:
            scaled = [b / len(right) for b in right]
        else:
            scaled = [g[..., None, None] * b for g, b in zip(self.gate.softmax(-1).unbind(-1), right, strict=True)]
        alike = {shape: [i for i, other in enumerate(self.shapes) if other == shape] for shape in self.shapes}
        return [
            (
                torch.stack([left[i].expand(*like.shape[:-2], *shape) for i in of], -3),
                torch.stack([scaled[i] for i in of], -3),
            )
            for shape, of in alike.items()
        ]

    def update(self) -> Tensor:
        return reduce(Tensor.add_, (kronecker_sum(a, b) for a, b in self.terms()))

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        if not is_thin(self.work(), self.view.shape):
            return super().linear(x, base, host)
        y = base(x)
        for a, b in self.terms():
            y = torch.add(y, kronecker_linear(x, a, b).to(y.dtype))
        return y

    def work(self) -> int:
        d_out, d_in = self.view.shape[-2:]
        return sum(work_of((a, b), (d_out // a, d_in // b)) for a, b in self.shapes)
