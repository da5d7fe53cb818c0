"""Which skills a task is made of: the router of `poly`, and the prior on its allocations.

Ponti et al. 2022, arXiv 2202.13914, eq. 1-3 and section 3.1; Griffiths and Ghahramani 2005 (the Indian-buffet process).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftwork.core.initial import tensor, uniform

if TYPE_CHECKING:
    from ..poly import Poly

SMALLEST = 1e-12  # beside the sum of the skills of a task, which may be none


class Router(nn.Module):
    """logits = Z [tasks, splits, skills], U(-1e-3, 1e-3); of a method with `frozen` tasks their rows are the buffer `known`,
    and only the others are in `logits`. A method with an `allocation` has it in the place of sigmoid(Z), and no tensor.
    """

    def __init__(self, method: Poly, like: Tensor | None) -> None:
        super().__init__()
        self.fixed = [[[float(mark) for mark in row]] * method.splits for row in method.allocation]
        self.tau = method.tau
        if self.fixed:
            return

        def rows(count: int) -> Tensor:
            return tensor((count, method.splits, method.skills), uniform(-1e-3, 1e-3), like)

        self.logits = nn.Parameter(rows(len(method.tasks) - method.frozen))
        self.register_buffer("known", rows(method.frozen) if method.frozen else None)

    known: Tensor | None

    @property
    def table(self) -> Tensor:
        """Z of all tasks, [tasks, splits, skills]."""
        return self.logits if self.known is None else torch.cat([self.known, self.logits])

    def forward(self, tasks: int | Tensor, draws: int | None, device: torch.device) -> Tensor:
        """w [splits, skills] of one task, or [rows, splits, skills]: of tasks [rows], or of as many draws. Not in half precision.

        draws: None takes sigmoid(Z); otherwise each row has a draw of its own, from torch's generator.
        """
        if self.fixed:
            z = torch.tensor(self.fixed, device=device)[tasks]
        else:
            logits = at_least_float(self.table)[tasks]
            if draws is not None:
                logits = logits.expand(draws, *logits.shape[-2:])
                eps = torch.finfo(logits.dtype).eps
                u = torch.rand(logits.shape, dtype=logits.dtype, device=device).clamp(eps, 1 - eps)
                logits = (u.log() - (-u).log1p() + logits) / self.tau
            z = logits.sigmoid()
        return z / (z.sum(-1, keepdim=True) + SMALLEST)


def at_least_float(t: Tensor) -> Tensor:
    """The tensor in float32, or in its own precision if that is higher."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def log_prior(logits: Tensor) -> Tensor:
    """log p(Z) = sum_j [log (T - m_j)! + log (m_j - 1)!] - sum_h log K_h!  under the Indian-buffet process, without its constants.

    logits [T, splits, skills], summed over the splits; Z = 1 where sigmoid(logits) > 1/2, with the gradient of the sigmoid
    (straight-through). m_j: tasks that use the skill j; one that none uses is no dish, and does not count. K_h: skills used by
    the very same tasks.  Source: Griffiths and Ghahramani 2005, eq. 14; Ponti et al. 2022, section 3.1.
    """
    p = at_least_float(logits).sigmoid()
    hard = p > 0.5
    m = (hard + (p - p.detach())).sum(0)  # [splits, skills]
    used = hard.any(0)
    m = torch.where(used, m, torch.ones_like(m))
    dishes = torch.lgamma(len(logits) - m + 1) + torch.lgamma(m)
    alike = (hard[..., :, None] == hard[..., None, :]).all(0)  # [splits, skills, skills]
    k = alike.sum(-1).to(m.dtype)
    histories = torch.lgamma(k + 1) / k  # each of the K_h skills has its share of log K_h!
    return torch.where(used, dishes - histories, torch.zeros_like(m)).sum()
