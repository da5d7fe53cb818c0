"""AdaLoRA: a low-rank update in the form of an SVD, whose rank is shared out among all matrices during training.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", eq. 3 to 12; where paper
and official code differ (QingruZhang/AdaLoRA), this is the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import fraction, number, positive, rank, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.triplets import Triplets

EPS = 1e-9  # a share of the training, t / T, that is at a boundary up to rounding is at it; a budget likewise


@method("adalora")
@dataclass(frozen=True)
class AdaLoRA(Method):
    """W' = W + s B diag(e) A,  s = alpha / (init_r + 1e-5),  A [init_r, in], e [init_r], B [out, init_r].  Identity at
    init (e = 0).

    Mergeable. `gw.auxiliary_loss` is gamma times the mean of |A A^T - I| and |B^T B - I| (Frobenius) over all matrices.
    `gw.step` after each optimiser step scores every triplet (e_i, row i of A, column i of B) by its smoothed
    sensitivity times its smoothed uncertainty (beta1, beta2) and sets the e_i of the worst ones, over ALL matrices, to
    zero, so that the number left follows the budget: init_r per matrix in the first t_init of training, then down along
    a cubic to target_r per matrix, which stands for the last t_final.  every: steps between two allocations; in between
    a zeroed e_i still learns and can come back, until the last allocation, which is final.  t_init, t_final: shares of
    the training.
    Parameters: init_r (in + out + 1) per weight in training; in the file only the triplets that are left.
    Source: Zhang et al. 2023, arXiv 2303.10512.
    When: the budget is fixed and it is unknown which matrices need rank; costs a schedule of three stages and one setting of its
        length.
    """

    init_r: int = rank(12)
    target_r: int = positive(8)
    alpha: float = number(16.0)
    beta1: float = fraction(0.85)
    beta2: float = fraction(0.85)
    gamma: float = number(0.1, low=0.0)
    t_init: float = fraction(0.1)
    t_final: float = fraction(0.3)
    every: int = positive(10)
    dropout: float = fraction(0.0)
    at: str = where("q, k, v, o, up, down | linear | conv")

    mergeable = True
    sized_by = ("init_r", "target_r")
    needs = ("step",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_r > self.init_r:
            raise GraftError(
                f"{self}", "target_r is larger than init_r", "start with more rank than is left in the end"
            )
        if self.t_init + self.t_final >= 1:
            raise GraftError(
                f"{self}", "t_init and t_final leave no time between them", "give shares with a sum below 1"
            )

    def build(self, site: Site, part: Part) -> Triplets:
        site.weight.require_matrix("adalora", self.dropout)
        part.shared("schedule", Schedule)
        matrices = sum(s.weight.copies for s in part.sites)
        return Triplets(
            site.weight, self.init_r, self.alpha / (self.init_r + 1e-5), self.dropout, self.gamma / (2 * matrices)
        )

    def count(self, site: Site) -> int:
        return site.weight.copies * self.init_r * (site.weight.d_in + site.weight.d_out + 1)

    def budget(self, matrices: int, progress: float) -> int:
        """How many triplets may be left after the share `progress` of the training."""
        full, final = self.init_r * matrices, self.target_r * matrices
        if progress <= self.t_init + EPS:
            return full
        if progress >= 1 - self.t_final - EPS:
            return final
        gone = (progress - self.t_init) / (1 - self.t_final - self.t_init)
        return int((full - final) * (1 - gone) ** 3 + final + EPS)

    @torch.no_grad()
    def step(self, part: Part, progress: float) -> None:
        deltas = [d for d in part.deltas.values() if isinstance(d, Triplets)]
        schedule = part.shared("schedule", Schedule)
        schedule.steps += 1
        if bool(schedule.settled):
            for d in deltas:
                if "gone" in d._buffers:  # a file without the training state holds the triplets that are left, only
                    d.values.masked_fill_(d.gone, 0)
            return
        final = progress >= 1 - self.t_final - EPS
        if not final:
            for d in deltas:
                d.observe(self.beta1, self.beta2)
        if final or (progress > self.t_init + EPS and int(schedule.steps) % self.every == 0):
            self.allocate(deltas, self.budget(sum(d.matrices for d in deltas), progress), final)
            schedule.settled.fill_(final)

    def allocate(self, deltas: list[Triplets], budget: int, final: bool) -> None:
        """Zero the values of the triplets beyond the budget, worst ones first, over all matrices."""
        scores = [d.scores() for d in deltas]
        flat = torch.cat([s.flatten().float().cpu() for s in scores])
        gone = torch.zeros_like(flat, dtype=torch.bool)
        # a stable order: exactly the surplus goes, and the same triplets on every process
        gone[flat.argsort(stable=True)[: max(0, flat.numel() - budget)]] = True
        for d, g in zip(deltas, gone.split([s.numel() for s in scores]), strict=True):
            where_gone = g.to(d.values.device).view_as(d.values)
            d.values.masked_fill_(where_gone, 0)
            if final:
                d.register_buffer("gone", where_gone)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Only the triplets that the final allocation left."""
        tensors = {key: d.kept() for key, d in part.deltas.items() if isinstance(d, Triplets)}
        return self, tensors, dict(part.shared_modules.state_dict())


class Schedule(nn.Module):
    """steps: how often the schedule was called;  settled: the final allocation is done."""

    steps: Tensor
    settled: Tensor

    def __init__(self) -> None:
        super().__init__()
        # on the CPU also under `torch.device("meta")`: the decisions are Python's
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device="cpu"))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool, device="cpu"))
