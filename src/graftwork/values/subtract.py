"""Extraction before subtraction: take from an adapter what an unwanted one does, but not what both have in common.

Hu et al. 2024, "Separate the Wheat from the Chaff: Model Deficiency Unlearning via Parameter-Efficient Module Operation".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.errors import GraftError
from ..grafting.graft import check_name, find
from ..grafting.install import check_free
from ..grafting.root import body_of
from .change import Change
from .hold import Composed, cut, hold
from .options import check_weights, is_rank
from .places import places


@torch.no_grad()
def subtract(
    model: nn.Module, name: str, expert: str, anti: str, *, alpha: float = 1.0, r: int | None = None
) -> Composed:
    """A new adapter, the expert without what the anti-expert does on its own. Row by row of each change, u and v:

        n = unit(unit(u) + unit(v)),   d = v - (v . n) n,   w = u - alpha d      (d = v where u and v are opposite)

    Heads, biases and norms stay the expert's. (The plain difference u - alpha v is combine's {expert: 1, anti: -alpha}.)
    r: the result is cut at this rank; None: it is exact. Every row of w is a sum of multiples of u and v, so that its rank
    is at most the sum of theirs.
    Raises GraftError, with the model as it was, for adapters that change activations.  Source: arXiv 2401.08427, HITsz-TMG/Ext-Sub.
    """
    asked = f"subtract {anti!r} from {expert!r}"
    body = body_of(model)
    check_free(model, body)
    check_name(model, name)
    check_weights({anti: alpha}, asked)
    if expert == anti:
        raise GraftError(asked, "the same adapter", "name two")
    if r is not None and not is_rank(r):
        raise GraftError(asked, f"r={r!r}", "give a whole number from 1 on")
    adapters = [find(model, expert), find(model, anti)]
    found, own = places(adapters, body, asked), places(adapters[:1], body, asked)
    pieces = []
    for place in found.matrices:
        zero = Change(matrix=torch.zeros(place.site.weight.shape, dtype=torch.float64))
        u, v = (place.change(n) if n in place.chains else zero for n in (expert, anti))
        if expert in place.chains:  # elsewhere u = 0, and nothing of v is its own: w = 0
            pieces.append(cut(place.site, Change(matrix=rows(u.dense, v.dense, alpha)), r))
    shifts = {(p.site.path, p.param): (p.site, p.shift(expert)) for p in own.vectors}
    values: dict[str, tuple[object, dict[str, Tensor]]] = {}
    for place in own.whole:
        value = place.chains[expert][0].adapted(place.param, None)
        if value is not None:
            values.setdefault(place.site.path, (place.site, {}))[1][place.param] = value.detach()
    recipe = {"of": {expert: 1.0, anti: -alpha}, "how": "subtract"}
    return hold(model, body, name, pieces, shifts, values, adapters[:1], recipe=recipe)  # type: ignore[arg-type]


def rows(u: Tensor, v: Tensor, alpha: float = 1.0) -> Tensor:
    """w of the rows u and v [*batch, out, in]."""
    n = _unit(_unit(u) + _unit(v))
    common = (v * n).sum(-1, keepdim=True) * n
    return u - alpha * (v - common)


def _unit(t: Tensor) -> Tensor:
    """Rows of length one; rows of (nearly) zero become zero."""
    length = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
    return torch.where(length > 1e-12, t / length.clamp_min(1e-300), 0)
