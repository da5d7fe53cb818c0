"""Training inside a random subspace of the weights, and the intrinsic dimension that is measured by it.

Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv 1804.08838, eq. 2; for single sub-modules He et
al. 2023 (KAdaptation), arXiv 2203.16329, section 3.2.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import count, positive, where
from graftwork.core.initial import drawing_from, normal, parameter, tensor, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site


@method("subspace")
@dataclass(frozen=True)
class Subspace(Method):
    """theta' = theta + P z,  theta all adapted weights side by side,  z [k] trained, P [|theta|, k] random and frozen.

    Identity at init (z = 0); mergeable. The entries of P are N(0, 1 / |theta|), so that its columns are of length 1 and nearly
    orthogonal; they are drawn on the CPU from `seed` and the names of the sites, and kept: k numbers for each adapted weight.
    Parameters: k in all.  Source: Li et al. 2018, eq. 2.
    When: to measure how many dimensions a task has (`gw.intrinsic_dimension`), not to solve it cheaply.
    """

    k: int = positive(100)
    seed: int = count(0)
    at: str = where("q, v | linear | conv")

    mergeable = True

    def build(self, site: Site, part: Part) -> Inside:
        site.weight.require_matrix("subspace")
        place = part.shared("place", lambda: Place(self.k, site.weight.like))
        size = sum(s.weight.copies * s.weight.d_in * s.weight.d_out for s in part.sites if s.weight.is_matrix)
        return Inside(self, site, place, size)

    def count(self, site: Site) -> int:
        return 0

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.k


class Place(nn.Module):
    """z [k]."""

    def __init__(self, k: int, like: Tensor | None) -> None:
        super().__init__()
        self.z = parameter((k,), zeros, like)


class Inside(WeightDelta):
    """directions = the rows of P of this weight [*batch, out, in, k], which are not stored."""

    lasting = True
    directions: Tensor

    def __init__(self, method: Subspace, site: Site, place: Place, size: int) -> None:
        super().__init__()
        with drawing_from(torch.Generator().manual_seed(method.seed + zlib.crc32(site.key.encode()))):
            made = tensor((*site.weight.shape, method.k), normal(size**-0.5), site.weight.like)
        self.register_buffer("directions", made, persistent=False)
        self._place = (place,)  # in a tuple: it hangs at the model's root, once

    def sources(self) -> Iterator[nn.Module]:
        yield from (self, *self._place)

    def update(self) -> Tensor:
        return self.directions @ self._place[0].z


def intrinsic_dimension(score: Callable[[int], float], full: float, grid: Sequence[int], share: float = 0.9) -> int:
    """d_90: the smallest k of `grid` for which score(k), of training in a random subspace of k dimensions, is at least share * full.

    score: trains a new `Subspace(k)` on the sub-module in question, and says how good it is (accuracy; more is better);  full: that
    of training all of the sub-module's weights;  grid: tried from the smallest.  GraftError where none reaches it.
    Sub-modules with a low d_90 are those to adapt (He et al. 2023).
    """
    tried = {}
    for k in sorted(grid):
        tried[k] = score(k)
        if tried[k] >= share * full:
            return k
    found = ", ".join(f"{k}: {value:.4g}" for k, value in tried.items()) or "no k to try"
    raise GraftError(f"k with a score of {share:g} x {full:.4g}", found, "give larger k")
