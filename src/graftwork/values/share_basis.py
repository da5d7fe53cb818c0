"""One basis for the residual adapters of several domains.

Rebuffi, Bilen and Vedaldi 2018, "Efficient Parametrization of Multi-domain Deep Neural Networks", section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Part
from ..core.errors import GraftError
from ..grafting.graft import attach, build, check_name, find
from ..grafting.install import check_free
from ..grafting.root import body_of
from ..methods.weight.parallel_conv import Parallel, ParallelConv


@torch.no_grad()
def share_basis(model: nn.Module, names: Mapping[str, str], k: int) -> dict[str, Adapter]:
    """New adapters whose 1 x 1 convolutions share their outputs' basis: A_t = U S_t, U [C_out, k], S_t [k, C_in].

    U are the k left singular vectors of M = [A_1 ... A_T] [C_out, T C_in] with the largest singular values, and
    S_t = U^T A_t: nothing is lost where k is the rank of M, otherwise |M - U S|_F is the norm of the values left out.
    names: of finished adapters with gw.ParallelConv of the same sites, and what the new ones are called. Their other
    parts (norms, heads) are copied.  U is one tensor for all of them, and fixed: each S_t may be trained again.
    The last one is active. Raises GraftError, with the model as it was, where sites differ or k has no place.
    """
    asked = f"share the basis of {', '.join(map(repr, names))}"
    given = {new: find(model, name) for name, new in names.items()}
    if len(given) < len(names) or not given:
        raise GraftError(asked, f"new names {list(names.values())}", "give at least one adapter, each new name once")
    found = {new: _matrices(adapter) for new, adapter in given.items()}
    first = next(iter(found.values()))
    if not first or any(matrices.keys() != first.keys() for matrices in found.values()):
        raise GraftError(
            asked, "not all have 1 x 1 convolutions at the same sites", "name gw.ParallelConv's of one kind"
        )
    bases = {key: _basis([matrices[key] for matrices in found.values()], k, f"{asked}: {key}") for key in first}
    body = body_of(model)
    check_free(model, body)
    for new in given:
        check_name(model, new)
    made = {new: Adapter(new, [_part(part, k, found[new], bases) for part in a.parts]) for new, a in given.items()}
    for adapter in made.values():
        attach(model, adapter, body_of(model))
    return made


def _matrices(adapter: Adapter) -> dict[str, Tensor]:
    deltas = [(key, d) for part in adapter.parts for key, d in part.deltas.items() if isinstance(d, Parallel)]
    return {key: d.matrix() for key, d in deltas}


def _basis(matrices: list[Tensor], k: int, asked: str) -> Tensor:
    m = torch.cat([a.double() for a in matrices], 1)
    if not 1 <= k <= min(m.shape):
        raise GraftError(asked, f"k={k} directions of a matrix {list(m.shape)}", f"choose k in 1..{min(m.shape)}")
    return torch.linalg.svd(m, full_matrices=False)[0][:, :k].to(matrices[0].dtype).contiguous()


def _part(part: Part, k: int, matrices: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> Part:
    own = isinstance(part.method, ParallelConv)
    method = replace(part.method, r=k, fixed=True) if isinstance(part.method, ParallelConv) else part.method
    made = build(method, part.sites, part.anatomy, torch.Generator().manual_seed(0))
    for key, delta in made.deltas.items():
        if own:
            delta._buffers["up"] = bases[key]  # one tensor in memory
            delta.get_parameter("down").copy_(bases[key].mT @ matrices[key])
        else:
            delta.restore({name: t.clone() for name, t in part.deltas[key].state_dict().items()})
    return made
