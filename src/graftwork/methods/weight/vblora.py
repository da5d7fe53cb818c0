"""VB-LoRA: the factors of all sites are put together from the vectors of one bank.

Li, Han and Ji 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", eq. 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import flag, fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.bank import Bank, Composed


@method("vblora")
@dataclass(frozen=True)
class VBLoRA(Method):
    """W' = W + B A, every stretch of `length` numbers of A [r, in] and B [out, r] a mix sum_j p_j V_j of `topk` of the
    `vectors` rows of one bank V [vectors, length], p = softmax over the topk largest logits.  Near the identity at init.

    The logits (one for each stretch and vector) and V are trained, by gradients to the kept logits and to V. length must
    divide the widths of every site.  logits_lr: learning rate of the logits as a multiple of the bank's (published: 1e-2
    and 1e-3), in `adapter.groups(lr)` and graftwork train.  dropout: on the input of A, in training only.
    only_topk: a file holds V and, for each stretch, the numbers of its vectors (uint8 below 256 vectors, then int16) and
        topk - 1 of their weights, which sum to one: the same function, but no training goes on from it. resume=True
        keeps the logits, as does only_topk=False.
    Init: V U(-init_bound, init_bound), logits N(0, init_std^2). Mergeable.
    Parameters: vectors length + r (in + out) / length vectors per weight.  Source: Li et al. 2024, arXiv 2405.15179.
    When: very many adapters must be stored: each is a choice out of one bank of vectors.
    """

    r: int = positive(4)
    vectors: int = positive(256)
    length: int = positive(256)
    topk: int = positive(2)
    dropout: float = fraction(0.0)
    logits_lr: float = number(10.0, low=0.0)
    init_bound: float = number(0.02, low=0.0)
    init_std: float = number(0.1, low=0.0)
    only_topk: bool = flag(True)
    at: str = where("q, k, v, o, up, gate, down | q, k, v, o, up, down | linear")

    identity = False
    mergeable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.vectors:
            raise GraftError(f"{self}", "more vectors in a mix than in the bank", "choose topk <= vectors")

    def build(self, site: Site, part: Part) -> Composed:
        w = site.weight
        w.require_matrix("vblora", self.dropout)
        if w.d_in % self.length or w.d_out % self.length:
            found = f"a weight of {w.d_out} x {w.d_in}, which length={self.length} does not divide"
            raise GraftError(f"{self} at {site.key}", found, "choose a length that divides both, or other sites")
        return Composed(self, site, part.shared("bank", lambda: Bank(self, w.like)))

    def rate(self, tensor: str) -> float:
        return self.logits_lr if tensor.startswith("logits_") else 1.0

    def count(self, site: Site) -> int:
        w = site.weight
        return w.copies * self.r * (w.d_in + w.d_out) // self.length * self.vectors

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.vectors * self.length

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        if not self.only_topk:
            return super().fold(part)
        tensors = {key: d.kept() for key, d in part.deltas.items() if isinstance(d, Composed)}
        return self, tensors, dict(part.shared_modules.state_dict())
