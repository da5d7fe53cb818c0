"""One learned weight for each adapter and place, and none at all.

Weighted: the second rule of Audio-AdapterFusion (Dalmia et al. 2023, arXiv 2310.13015); the weights that EMEA sets (Wang et al. 2021).
Uniform: the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import flag, words
from graftwork.core.initial import parameter, zeros
from graftwork.core.method import Method, method
from graftwork.core.mixer import Members, Mixer
from graftwork.core.site import Site


@method("weighted")
@dataclass(frozen=True)
class Weighted(Method):
    """y' = y + sum_n softmax(a)_n (z_n - y), a [N] per place, starting at zero: the mean.

    of: which adapters, the texts of expressions.  joint: they are trained with it; otherwise they stay as they are.
    Parameters per place: N.
    When: as uniform, where a few rows are at hand to weigh the adapters.
    """

    mixes = True
    identity = False

    of: tuple[str, ...] = words()
    joint: bool = flag(False)

    def build(self, site: Site, part: Part) -> WeightedMixer:
        return WeightedMixer(len(self.of), site)

    def count(self, site: Site) -> int:
        return len(self.of)


class WeightedMixer(Mixer):
    """logits = a [N], or [batch, N] where each row of a batch has its own."""

    def __init__(self, n: int, site: Site) -> None:
        super().__init__()
        self.logits = parameter((n,), zeros, site.like)

    def weights(self, x: Tensor, y: Tensor, members: Members) -> Tensor:
        a = self.logits[..., list(members.who)]
        if a.dim() > 1:  # [batch, n] beside y [batch, ..., d]
            if len(a) != len(y):
                found = f"{len(y)} rows, and weights of {len(a)}"
                raise GraftError(f"a mixture at {self.key}", found, "mix adapters where the first axis is the batch")
            a = a.reshape(a.shape[0], *[1] * (y.dim() - 2), -1)
        return torch.softmax(a, -1)


@method("uniform")
@dataclass(frozen=True)
class Uniform(Method):
    """y' = y + mean_n (z_n - y): every adapter that acts at a place counts the same. Trains nothing.

    When: adapters of one task or of near domains shall be averaged in their outputs, with nothing to train.
    """

    mixes = True
    trains = False
    identity = False

    of: tuple[str, ...] = words()
    joint: bool = flag(False)

    def build(self, site: Site, part: Part) -> UniformMixer:
        return UniformMixer()

    def count(self, site: Site) -> int:
        return 0


class UniformMixer(Mixer):
    """w_n = 1/N."""

    def weights(self, x: Tensor, y: Tensor, members: Members) -> Tensor:
        n = len(members.who)
        return y.new_full((n,), 1 / n)
