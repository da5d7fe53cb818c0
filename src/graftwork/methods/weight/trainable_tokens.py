"""Trainable tokens: chosen rows of the token embedding have values of their own.

HF PEFT's TrainableTokensConfig; the rows stand in the place of the backbone's, so that nothing of a fresh row leaks in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import where
from graftwork.core.initial import parameter, values
from graftwork.core.method import Method, method
from graftwork.core.site import Site


def _ids(value: Any) -> str:
    good = isinstance(value, tuple) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    return "" if good and len(set(value)) == len(value) else "different token ids >= 0"


@method("trainable_tokens")
@dataclass(frozen=True)
class TrainableTokens(Method):
    """W'[t_i] = V_i for the tokens t_1 ... t_n, V [n, d] initialised at W[t]; all other rows stay W's.  Identity at init;
    mergeable.

    tokens: their ids.  at: an embedding, also the output layer ("embed, lm_head"). Sites that use one tensor (tied
    weights) share one V.
    Parameters: n d for every tensor.  Source: HF PEFT's TrainableTokensConfig; a row replaced, not added to.
    When: a few new or special tokens must be learned, with the rest of the vocabulary untouched.
    """

    tokens: tuple[int, ...] = dataclasses.field(default=(), metadata={"check": _ids})
    at: str = where("embed")

    mergeable = True

    def build(self, site: Site, part: Part) -> Rows | None:
        tables = [s.exit for s in part.anatomy.of("entry")]
        if site.role == "embed" and tables and not (site.weight.lookup and self.fed(site, part, tables)):
            return None  # positions, or what turns patches into vectors
        w = site.weight
        if not w.is_matrix or w.batch or site.rows is not None or not (w.lookup or w.linear):
            found = f"{type(site.module).__name__}, or a part of it, which has no row for a token"
            raise GraftError(f"{self} at {site.key}", found, "choose an embedding or the output layer")
        size = w.d_in if w.lookup else w.d_out
        if not self.tokens or max(self.tokens) >= size:
            raise GraftError(f"{self} at {site.key}", f"{size:,} rows", f"give tokens below {size:,}, at least one")
        first = next(s for s in part.sites if _tensor(s) is _tensor(site))
        return Rows(self, site, part.deltas.get(first.key))

    def fed(self, site: Site, part: Part, tables: Sequence[str | None]) -> bool:
        """Whether tokens enter the backbone through the site's tensor."""
        inputs = [s for s in part.anatomy.of("embed") if s.path in tables]
        return not inputs or any(_tensor(s) is _tensor(site) for s in inputs)

    def count(self, site: Site) -> int:
        return 0

    def count_shared(self, sites: Sequence[Site]) -> int:
        distinct = {id(_tensor(s)): s.weight for s in sites}
        return len(self.tokens) * sum(w.d_out if w.lookup else w.d_in for w in distinct.values())


def _tensor(site: Site) -> nn.Parameter | None:
    return site.module._parameters[site.param]


class Rows(WeightDelta):
    """rows = V [n, d], where it is not that of an earlier site with the same tensor."""

    lasting = True

    def __init__(self, method: TrainableTokens, site: Site, owner: Any) -> None:
        super().__init__()
        stored, w = _tensor(site), site.weight
        assert stored is not None
        self.tokens, self.lookup = list(method.tokens), w.lookup
        self._owner = () if owner is None else (owner,)  # in a tuple: the rows are stored where they were first
        if owner is None:
            dense = w.dense(stored.detach())
            rows = (dense.mT if w.lookup else dense)[self.tokens]
            self.rows = parameter(tuple(rows.shape), values(rows), stored)

    def weight(self, w: Tensor) -> Tensor:
        return self._put(w, columns=self.lookup)

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        """In the layout it is stored in: a vocabulary that has grown since has other rows, and these stay where they are."""
        return (
            stored
            if stored is None
            else self._put(stored, columns=self.view.layout == "transposed" and not self.lookup)
        )

    def _put(self, w: Tensor, columns: bool) -> Tensor:
        index = torch.tensor(self.tokens, device=w.device)
        rows = (self._owner[0] if self._owner else self).rows.to(w.dtype)
        return w.index_copy(1, index, rows.mT) if columns else w.index_copy(0, index, rows)

    def sources(self) -> Iterator[nn.Module]:
        yield from (self, *self._owner)
