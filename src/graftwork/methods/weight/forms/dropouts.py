"""The two dropouts of LyCORIS's methods, which leave out rows of the update, or all of it (KohakuBlueleaf/LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.delta import WeightDelta


@dataclass(frozen=True)
class Dropouts:
    """dW <- dW * m, in a training pass only, drawn anew in each.

    rank: p; every output row has m = 0 with probability p (weight-row dropout, despite its name in LyCORIS).
    scaled: m is divided by its mean, so that the rows that are left make up for the others; where none is left m stays 0.
    module: the probability that m = 0 for all rows of a site; what is kept is not rescaled.
    """

    rank: float = 0.0
    scaled: bool = True
    module: float = 0.0

    def kept(self, delta: WeightDelta, like: Tensor) -> Tensor | None:
        """m [*batch, out] of this pass, None for all ones."""
        if not (self.rank or self.module) or not delta.training or not delta.runtime.open:
            return None  # what is merged is never drawn
        keep = (torch.rand(delta.view.shape[:-1], device=like.device) >= self.rank).to(like.dtype)
        if self.scaled:
            keep = keep / keep.mean(-1, keepdim=True).clamp_min(1 / keep.shape[-1])
        return keep * (torch.rand((), device=like.device) >= self.module) if self.module else keep

    def of_rows(self, t: Tensor, delta: WeightDelta) -> Tensor:
        """t [*batch, out, n], its rows multiplied by m."""
        keep = self.kept(delta, t)
        return t if keep is None else t * keep[..., None]
