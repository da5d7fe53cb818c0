"""DyLoRA: one LoRA, trained for all ranks at once, so that any of them can be cut out of it.

Valipour et al. 2022, "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation", arXiv 2210.07558, section 4; huawei-noah/Efficient-NLP.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import count, flag, fraction, number, rank, shares, where
from graftwork.core.initial import kaiming_uniform, normal, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.lowrank import low_rank


@method("dylora")
@dataclass(frozen=True)
class DyLoRA(Method):
    """W' = W + (alpha / b) B[:, :b] A[:b, :],  A [r, in],  B [out, r],  1 <= b <= r.  Identity at init (B = 0);
    mergeable.

    In training b ~ p_B, drawn once a step for all weights, from the seed and the number of the step: every process
    draws the same. The other rows of A and columns of B stay as they are to the bit, whatever the optimiser's momentum
    and weight decay: gw.step after each optimiser step sees to it, and asks for the next draw.
    In evaluation b is what gw.context(model, rank=b) says, r otherwise; so also for gw.merge, and for
    gw.combine(model, "cut", {"adapter": 1.0}), whose LoRA of rank b is exact.
    r: the largest rank.  distribution: p_B, r numbers in any scale; empty is uniform.  dropout: on the input of A, in
        training only.
    frozen: only row b of A and column b of B learn (the paper's cheaper rule).
    Init: A kaiming-uniform (a = sqrt 5), B zero; on an embedding A zero, B N(0, 1).
    Parameters: r (in + out) per weight; b (in + out) of what is cut out.
    When: the rank to be served is not known at training time: one training gives every rank up to r.
    """

    r: int = rank(8)
    alpha: float = number(16.0)
    distribution: tuple[float, ...] = shares()
    frozen: bool = flag(False)
    dropout: float = fraction(0.0)
    seed: int = count(0)
    at: str = where("q, v | linear | conv")

    mergeable = True
    needs = ("step",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distribution and len(self.distribution) != self.r:
            found = f"{len(self.distribution)} numbers for the ranks 1 to {self.r}"
            raise GraftError(f"DyLoRA(distribution={self.distribution})", found, f"give {self.r} numbers, or none")

    def build(self, site: Site, part: Part) -> Nested:
        site.weight.require_matrix("dylora", self.dropout)
        part.shared("schedule", Steps)
        return Nested(self, site)

    def count(self, site: Site) -> int:
        return site.weight.copies * self.r * (site.weight.d_in + site.weight.d_out)

    def draw(self, step: int) -> int:
        """b of a step."""
        return random.Random(f"{self.seed} {step}").choices(range(1, self.r + 1), self.distribution or None)[0]

    def begin(self, part: Part) -> None:
        b = self.draw(int(part.shared("schedule", Steps).steps))
        for delta in part.deltas.values():
            if isinstance(delta, Nested):
                delta.begin(b)

    def step(self, part: Part, progress: float) -> None:
        trained = [d for d in part.deltas.values() if isinstance(d, Nested) and d.down.requires_grad]
        for delta in trained:
            delta.hold()
        part.shared("schedule", Steps).steps += bool(trained)
        self.begin(part)  # a compiled pass does not ask


class Steps(nn.Module):
    """steps: how many there were."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        # on the CPU also under `torch.device("meta")`: the draws are Python's
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device="cpu"))


class Nested(WeightDelta):
    """down = A [*batch, r, in], up = B [*batch, out, r].  drawn: b of this training step, None before the first."""

    def __init__(self, method: DyLoRA, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.down = w.parameter(method.r, w.d_in, zeros if w.lookup else kaiming_uniform())
        self.up = w.parameter(w.d_out, method.r, normal() if w.lookup else zeros)
        self.r, self.alpha, self.frozen, self.dropout = method.r, method.alpha, method.frozen, method.dropout
        self.drawn: int | None = None
        self.before: tuple[Tensor, Tensor] | None = None  # the factors then

    @property
    def rank(self) -> int:
        """b. GraftError where the context says none of 1 to r."""
        b = self.drawn if self.training and self.drawn is not None else self.context("rank", self.r)
        if not isinstance(b, int) or not 1 <= b <= self.r:
            raise GraftError(f"rank={b!r} at {self.key}", f"ranks 1 to {self.r}", "give one: gw.context(model, rank=4)")
        return b

    def cut(self) -> tuple[Tensor, Tensor, float]:
        """(A[:b], B[:, :b], alpha / b)."""
        b = self.rank
        down, up = self.down[..., :b, :], self.up[..., :b]
        if self.frozen and self.training:
            down = torch.cat([down[..., :-1, :].detach(), down[..., -1:, :]], -2)
            up = torch.cat([up[..., :-1].detach(), up[..., -1:]], -1)
        return down, up, self.alpha / b

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up, scale = self.cut()
        return down, scale * up

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        return low_rank(x, base, host, *self.cut(), self.dropout if self.training else 0.0)

    def begin(self, b: int) -> None:
        """A pass of a step with the draw b begins. One that is not trained has all its ranks."""
        self.drawn = b if self.down.requires_grad else None
        self.before = (self.down.detach().clone(), self.up.detach().clone()) if self.drawn else None

    @torch.no_grad()
    def hold(self) -> None:
        """After the optimiser's step: what the draw leaves out is as it was before."""
        if self.drawn is None or self.before is None:
            return
        down, up = self.before
        for rows in (slice(0, self.drawn - 1 if self.frozen else 0), slice(self.drawn, self.r)):
            self.down[..., rows, :] = down[..., rows, :]
            self.up[..., rows] = up[..., rows]
        self.before = None
