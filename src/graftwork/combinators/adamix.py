"""AdaMix: several copies of an adapter, one of them drawn for each training pass, and all of them one adapter afterwards.

Wang et al. 2022, "AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning", arXiv 2205.12410, and
microsoft/AdaMix.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.fields import choice, inner, number, positive
from graftwork.core.initial import Later, drawing_from
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.sites.anatomy import Anatomy

from .copies import Copies, CopiesDelta, CopiesWeight, side_of
from .inherit import Around
from .substituted import template


@method("adamix")
@dataclass(frozen=True)
class AdaMix(Around):
    """Training: h' = h + U_j g(D_i h), i and j drawn from 1..M, apart from each other, for each site and pass, one draw for the batch.
    Evaluation, merging and files: the adapter whose tensors are the means of the copies.

    of: the method inside, M times; its factors at the output (U, B) are one side, all its other tensors the other.
    copies: M.  share: the side of which there is one copy only: "up" (as published, also LoRA's B), "down", or "none".
    consistency: weight of 1/2 (KL(p || p') + KL(p' || p)) in the loss, p and p' the softmax over the last axis of the logits in two passes,
        a mean over rows and tokens that are no padding: gw.auxiliary_loss(model, outputs, lambda: model(**batch)).
    The copies start alike. Draws come from torch's generator for the CPU; a compiled model draws at gw.step.
    Identity and merging as the method inside (published: from torch's initial values of a linear layer; here U starts at zero).
    Parameters in training: with share="up" M (r d + r) + (r d + d) per bottleneck; in a file those of the method inside.
    Source: sections 3.1 to 3.3.
    When: an adapter's capacity is what limits it, and inference may not become dearer: copies are trained and averaged into one.
    """

    of: Method = inner("bottleneck", d=16, at="down | linear | conv")
    copies: int = positive(4)
    share: str = choice("up", "up", "down", "none")
    consistency: float = number(1.0, low=0.0)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """A draw for each pass, and a second pass to compare."""
        return ("begin", "again") if self.consistency else ("begin",)

    def build(self, site: Site, part: Part) -> Delta | None:
        delta = template(self, self.of, site, part)
        if delta is None:
            return None
        made = CopiesWeight() if isinstance(delta, WeightDelta) else CopiesDelta()
        made.setup(delta, self.copies, self.share)
        return made

    def count(self, site: Site) -> int:
        with drawing_from(Later()):  # which side a tensor is on is known when it is built
            delta = self.of.build(site, Part(self.of, [site], Anatomy("", (site,), ())))
        if delta is None:
            return 0
        copied = sum(p.numel() for name, p in delta.named_parameters() if side_of(name) != self.share)
        return self.of.count(site) + (self.copies - 1) * copied

    def begin(self, part: Part) -> None:
        for delta in part.deltas.values():
            if isinstance(delta, Copies):
                delta.draw()

    def step(self, part: Part, progress: float) -> None:
        self.begin(part)

    def compare(self, part: Part, one: Tensor, other: Tensor) -> Tensor:
        mask = next(iter(part.deltas.values())).runtime.mask
        apart = symmetric_kl(one, other)
        if mask is not None and mask.shape == apart.shape:
            return self.consistency * (apart * mask).sum() / mask.sum().clamp(min=1)
        return self.consistency * apart.mean()

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The one adapter, as the method inside stores it."""
        within = Part(self.of, part.sites, part.anatomy)
        with ExitStack() as means:
            for key, delta in part.deltas.items():
                if isinstance(delta, Copies):
                    within.deltas[key] = delta.delta
                    means.enter_context(delta.averaged())
            stored, tensors, shared = self.of.fold(within)
        return dataclasses.replace(stored, at=self.at, layers=self.layers), tensors, shared


def symmetric_kl(one: Tensor, other: Tensor) -> Tensor:
    """1/2 (KL(p || p') + KL(p' || p)) for the logits of p and p', over the last axis."""
    p, q = one.float().log_softmax(-1), other.float().log_softmax(-1)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1)
