"""Diff pruning: a difference to every number of the backbone, behind a stochastic gate that learns to close.

Guo, Rush and Kim 2020, "Parameter-Efficient Transfer Learning with Diff Pruning", eq. 3 to 8; the gate is the hard concrete
one of Louizos et al. 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, fraction, number, where
from graftwork.core.initial import constant, parameter
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.difference import Difference, budget, largest, size

EPS = 1e-4  # u is drawn from (EPS, 1 - EPS)


@method("diff_pruning")
@dataclass(frozen=True)
class DiffPruning(Method):
    """theta = theta_0 + z w,  z = clamp(s (high - low) + low, 0, 1),  s = sigmoid(log u - log(1 - u) + a).  Mergeable.

    One w_i (init 0: identity) and one log-odds a_i (init `alpha`) for each of the N weights and biases of all sites, u uniform,
    drawn in each training pass (stochastic) and 1/2 outside of training; structured: one more gate z_g for each tensor,
    theta = theta_0 + z_g z w.
    1. For the share `dense` of the training, `gw.auxiliary_loss` is l0 times the expected number of open gates, c = log(-low / high):
       penalty "sum" (the official code): sum_i sigmoid(a_i - c) + sum_g sigmoid(a_g - c);  "product" (the paper, groups):
       sum_g sigmoid(a_g - c) sum_i sigmoid(a_i - c).
    2. The floor(density N) largest |z w|, over all sites together, are kept (u = 1/2, where the official code takes its last
       draw: a run that is resumed is the same).  3. Only these are trained, from where they are, with fresh moments where the
       optimiser is given to `gw.step`.
    Learning rates: w that of the adapter (1e-5 in the paper), a alpha_rate times it.
    Parameters: 2 N and one for each tensor in the first stage, floor(density N) in the last and, with their places, in the file.
    Memory: about three backbones in training, and the step of full fine-tuning.
    Source: Guo et al. 2020, arXiv 2012.07463; dguo98/DiffPruning.
    When: the difference itself shall be sparse and exact for many tasks, and memory of three backbones is no obstacle.
    """

    density: float = number(0.005, 0.0, 1.0)
    low: float = number(-1.5, high=0.0)
    high: float = number(1.5, low=1.0)
    alpha: float = number(5.0)
    l0: float = number(1.25e-7, low=0.0)
    penalty: str = choice("sum", "sum", "product")
    structured: bool = flag(True)
    stochastic: bool = flag(True)
    dense: float = fraction(0.5)
    alpha_rate: float = number(1e4, low=0.0)
    at: str = where("linear, norm, embed | linear, norm | linear | conv")

    mergeable = True
    lr = 1e-3
    needs = ("step",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low == 0:
            raise GraftError(f"{self}", "low=0: a gate that never closes", "give low below 0")

    def build(self, site: Site, part: Part) -> Pruned:
        budget(None, self.density, part.sites)
        return Pruned(self, site)

    def count(self, site: Site) -> int:
        tensors = 1 if size(site) == math.prod(site.weight.shape) else 2
        return 2 * size(site) + (tensors if self.structured else 0)

    def rate(self, tensor: str) -> float:
        return self.alpha_rate if tensor.startswith(("alpha.", "group.")) else 1.0

    @torch.no_grad()
    def step(self, part: Part, progress: float) -> None:
        deltas = [d for d in part.deltas.values() if isinstance(d, Pruned)]
        if progress < self.dense or all(d.settled for d in deltas):
            return
        pruned = [(d, name, d.value(name)) for d in deltas for name in d.tensors()]
        masks = largest((v.abs() for _, _, v in pruned), budget(None, self.density, part.sites))
        for (delta, name, value), mask in zip(pruned, masks, strict=True):
            delta.settle(name, mask, value)
            part.renewed.append(delta.tensors()[name])

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Only what was kept: flat places and values."""
        return self, {key: d.folded() for key, d in part.deltas.items() if isinstance(d, Pruned)}, {}


class Pruned(Difference):
    """alpha, group: the log-odds of the gates, by the tensor's name."""

    def __init__(self, method: DiffPruning, site: Site) -> None:
        super().__init__(site)
        self.method, start, like = method, constant(method.alpha), site.weight.like
        self.alpha, self.group = nn.ParameterDict(), nn.ParameterDict()
        for name, p in self.tensors().items():
            self.alpha[name] = parameter(tuple(p.shape), start, like)
            if method.structured:
                self.group[name] = parameter((), start, like)

    def dense(self, name: str) -> Tensor:
        z = self.gate(self.alpha[name])
        if name in self.group:
            z = z * self.gate(self.group[name])
        return z * self.tensors()[name]

    def gate(self, alpha: Tensor) -> Tensor:
        """z, of the shape of the log-odds."""
        odds, m = alpha.float(), self.method
        if m.stochastic and self.training and torch.is_grad_enabled():
            u = torch.empty_like(odds).uniform_(EPS, 1 - EPS)
            odds = odds + u.log() - (-u).log1p()
        return (odds.sigmoid() * (m.high - m.low) + m.low).clamp(0, 1).to(alpha.dtype)

    def auxiliary_loss(self) -> Tensor | None:
        if self.settled:
            return None
        m, terms = self.method, []
        c = math.log(-m.low / m.high)
        for name, alpha in self.alpha.items():
            of_all = (alpha - c).sigmoid().sum()
            of_group = (self.group[name] - c).sigmoid() if name in self.group else None
            if of_group is not None:
                of_all = of_all + of_group if m.penalty == "sum" else of_all * of_group
            terms.append(of_all)
        return m.l0 * torch.stack(terms).sum()

    @property
    def pruned(self) -> int:  # type: ignore[override]
        gates = sum(p.numel() for d in (self.alpha, self.group) for p in d.values())
        return super().pruned + gates if self.settled else 0

    def folded(self) -> dict[str, Tensor]:
        gates = {f"{kind}.{n}": p.detach() for kind in ("alpha", "group") for n, p in getattr(self, kind).items()}
        return super().folded() if self.settled else super().folded() | gates

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if any(name.startswith("index.") for name in tensors):  # the gates have done their work
            self.alpha, self.group = nn.ParameterDict(), nn.ParameterDict()
        super().restore(tensors)
