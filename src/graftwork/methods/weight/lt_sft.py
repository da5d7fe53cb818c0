"""LT-SFT: find the numbers of the backbone that move most, go back to the start, and train only those.

Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", section 3 (lottery ticket sparse fine-tuning).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.fields import fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.difference import Difference, budget, largest, size


@method("lt_sft")
@dataclass(frozen=True)
class LTSFT(Method):
    """theta = theta_0 + phi,  phi sparse, over the weights and biases of all sites as one vector of N numbers.  Mergeable.

    Identity at init, and again when the second phase begins (phi = 0).
    1. For the share `full` of the training all of phi is trained.  2. The K largest |phi_i| are chosen, over all sites together;
    phi goes back to 0 (theta to theta_0), and from then on phi_i moves for these alone, whatever the optimiser does: give it to
    `gw.step`, which drops its moments at that point.
    k: K; None takes the share `density` of N.  l1: `gw.auxiliary_loss` is l1 / N sum |phi_i| (0.1 for language modelling).
    Differences compose by addition: "task + language", which says theta_0 + phi_task + phi_language.
    Parameters: N in the first phase, K in the second and, with their places, in the file. Memory: phi, and a mask of bytes.
    A tensor's phi stays dense while it is trained: its gradient is that of full fine-tuning (half a step more than the frozen
    bound).  Source: Ansell et al. 2022, arXiv 2110.07560; cambridgeltl/composable-sft. One round, as in the paper's results.
    When: sparse differences that shall be added (a language's and a task's) without colliding.
    """

    density: float = number(0.01, 0.0, 1.0)
    k: int | None = positive(None)
    full: float = fraction(0.25)
    l1: float = number(0.0, low=0.0)
    at: str = where("linear, norm, embed | linear, norm | linear | conv")

    mergeable = True
    needs = ("step",)

    def build(self, site: Site, part: Part) -> Moved:
        budget(self.k, self.density, part.sites)
        return Moved(site, self.l1 / sum(size(s) for s in part.sites))

    def count(self, site: Site) -> int:
        return size(site)

    @torch.no_grad()
    def step(self, part: Part, progress: float) -> None:
        deltas = [d for d in part.deltas.values() if isinstance(d, Moved)]
        if progress < self.full or all(d.settled for d in deltas):
            return
        moved = [(d, name, p) for d in deltas for name, p in d.tensors().items()]
        masks = largest((p.abs() for _, _, p in moved), budget(self.k, self.density, part.sites))
        for (delta, name, p), mask in zip(moved, masks, strict=True):
            delta.settle(name, mask, torch.zeros_like(p))
            part.renewed.append(p)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Only what the mask keeps: flat places and values."""
        return self, {key: d.folded() for key, d in part.deltas.items() if isinstance(d, Moved)}, {}


class Moved(Difference):
    """share: l1 / N."""

    def __init__(self, site: Site, share: float) -> None:
        super().__init__(site)
        self.share = share

    def auxiliary_loss(self) -> Tensor | None:
        if not self.share:
            return None
        return self.share * torch.stack([self.value(name).abs().sum() for name in self.tensors()]).sum()
