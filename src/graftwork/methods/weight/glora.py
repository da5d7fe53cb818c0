"""GLoRA: one formula for scaling, shifting, low-rank updates, tuned biases and prompts of a linear layer.

Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv 2306.07967, eq. 8 to 10
and section 3.3; Arnav0400/ViT-Slim. HF PEFT drops C, D and E where the host has no bias: here b = 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, rank, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.supports import Supports
from .forms.views import KINDS, LARGEST, Choice

if TYPE_CHECKING:
    from torch import Tensor


@method("glora")
@dataclass(frozen=True)
class GLoRA(Method):
    """W' = W + W * A + B,  b' = b + D * b + E + W C,  * by elements, with broadcasting.  Identity at init; mergeable.

    a, b: A and B, "lora" up [out, r] down [r, in] · "vector" [out, 1] · "constant" [1, 1] · "none".
    c: "lora" up [in, r] down [r, 1] · "vector" [in, 1] · "none".  d, e: "vector" [out] · "constant" [1] · "none".
    A host without a bias gets one from E and C, and has no D; one without a place for it takes c, d, e = "none" only.
    supernet: every weight holds the largest of all five, and the other kinds are views of them: the vector is the first
        column of `up`, the constant its first number, rank r' its first r' columns. A training pass draws a choice for
        each weight; `gw.evolve` finds the best, and what that does not use is left out of the file. Undecided, the
        largest acts in evaluation.
    Cost: with A as "lora" the gradient passes through all of W', so that a step has N in out multiply-adds more for N
        positions, half of what the frozen layer has; not so with any other A.
    Init: `down` xavier-uniform, all else zero.
    Parameters per weight: r (in + out) | out | 1 | 0 for A and for B, r (in + 1) | in | 0 for C, out | 1 | 0 for D and
        for E; in a supernet 2 r (in + out) + r (in + 1) + 2 out.
    When: scale, shift, prompt and low-rank changes shall be searched for each layer (with `gw.evolve`), and the result merged.
    """

    r: int = rank(4)
    a: str = choice("lora", *KINDS["a"])
    b: str = choice("lora", *KINDS["b"])
    c: str = choice("lora", *KINDS["c"])
    d: str = choice("vector", *KINDS["d"])
    e: str = choice("vector", *KINDS["e"])
    supernet: bool = flag(False)
    at: str = where("q, k, v, o, up, down | linear | conv")

    mergeable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.supernet and self.kinds != LARGEST:
            raise GraftError(f"{self}", "a supernet holds the largest kinds", "leave a, b, c, d and e out")
        if set(self.kinds) == {"none"}:
            raise GraftError(f"{self}", "nothing to train", "give one of a, b, c, d, e")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The beginning of a pass, where a supernet draws."""
        return ("begin",) if self.supernet else ()

    @property
    def kinds(self) -> Choice:
        """The kinds of all five."""
        return Choice(self.a, self.b, self.c, self.d, self.e)

    def build(self, site: Site, part: Part) -> Supports:
        w = site.weight
        w.require_matrix("glora")
        if w.bias is None and set(self.kinds[2:]) != {"none"}:
            found = f"{type(site.module).__name__}, which has no place for a bias"
            raise GraftError(f"{self} at {site.key}", found, "set c, d and e to 'none' for these sites")
        if not self.count(site):
            raise GraftError(f"{self} at {site.key}", "nothing to train: D * b without a bias b", "choose other sites")
        return Supports(self, site)

    def count(self, site: Site) -> int:
        w = site.weight
        d_in, d_out, r = w.d_in, w.d_out, self.r
        matrix = {"lora": r * (d_in + d_out), "vector": d_out, "constant": 1, "none": 0}
        column = {"lora": r * (d_in + 1), "vector": d_in, "none": 0}
        vector = {"vector": d_out, "constant": 1, "none": 0}
        d = vector[self.d] if self.biased(site) else 0
        return w.copies * (matrix[self.a] + matrix[self.b] + column[self.c] + d + vector[self.e])

    def biased(self, site: Site) -> bool:
        """Whether the host has a bias."""
        name = site.weight.bias
        return name is not None and site.module._parameters.get(name) is not None

    def chosen(self, site: Site, of: Choice) -> int:
        """`count` of a choice."""
        return 0 if set(of) == {"none"} else replace(self, supernet=False, **of._asdict()).count(site)

    def begin(self, part: Part) -> None:
        for delta in part.deltas.values() if self.supernet else ():
            if isinstance(delta, Supports):
                trained = any(p.requires_grad for p in delta.parameters())
                drawn = (options[int(torch.randint(len(options), ()))] for options in KINDS.values())
                delta.drawn = Choice(*drawn) if trained else None

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        return self, {key: d.stored() for key, d in part.deltas.items() if isinstance(d, Supports)}, {}
