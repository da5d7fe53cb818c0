"""A principal subspace out of finished LoRAs, and adapters that live in it.

Kaushik et al. 2025, "EigenLoRAx: Recycling Adapters to Find Principal Subspaces for Resource-Efficient Adaptation and
Inference", arXiv 2502.04700, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.delta import WeightDelta
from ..core.errors import GraftError
from ..grafting.graft import attach, build, check_name, find
from ..grafting.install import check_free
from ..grafting.root import body_of
from ..methods.weight.eigenlorax import Coordinates, EigenLoRAx

Factors = dict[str, tuple[Tensor, Tensor]]  # by site key: A [*batch, r, in] and B [*batch, out, r], with its scale


@torch.no_grad()
def recycle(
    model: nn.Module, name: str, of: Sequence[str], r: int = 8, k: int = 32, extra: int = 32, seed: int = 0
) -> Adapter:
    """A new adapter, active and trainable, whose factors are combinations of the k principal directions of those of `of`.

    At each site M_A = [A_1^T .. A_T^T] [in, sum of ranks] and M_B = [B_1 .. B_T] are centred row by row (less the mean over
    their columns), and the k left singular vectors of the largest singular values are the directions; the direction of the
    mean itself is lost, unless others span it.  extra: so many random directions more, orthogonal to these, from `seed`.
    of: adapters on `model` with low-rank updates of the same sites; what else they hold (heads) is not taken.
    Raises GraftError, with the model as it was, where sites differ, or where there are fewer than k directions.
    """
    asked = f"recycle {', '.join(map(repr, of))}"
    if not of or len(set(of)) < len(of):
        raise GraftError(asked, f"{list(of)}", "name each finished adapter once, at least one")
    given = [_factors(find(model, n), asked) for n in of]
    if any(factors.keys() != given[0].keys() for factors in given[1:]):
        other = next(key for f in given for key in f.keys() ^ given[0].keys())
        raise GraftError(asked, f"{other} is in some of them only", "recycle adapters of the same sites")
    adapter, deltas = _made(
        model, name, EigenLoRAx(r=r, k=k, extra=extra, at=_roles(find(model, of[0]))), given[0], seed
    )
    generator = torch.Generator().manual_seed(seed)
    for key, delta in deltas.items():
        columns = torch.cat([f[key][0].mT for f in given], dim=-1), torch.cat([f[key][1] for f in given], dim=-1)
        first, last = (_directions(m, k, extra, generator, f"{asked}: {key}") for m in columns)
        delta.basis_down.copy_(first.mT)
        delta.basis_up.copy_(last)
    return _hung(model, adapter)


@torch.no_grad()
def project(model: nn.Module, name: str, of: str, onto: str) -> Adapter:
    """A new adapter: the low-rank updates of `of` in the subspace of `onto`, an EigenLoRAx adapter of the same sites.

    L_A = P_A^T A^T, L_B = P_B^T B: the nearest factors that the subspace holds. Raises GraftError where sites differ.
    """
    asked, basis = f"project {of!r} onto {onto!r}", find(model, onto)
    given = _factors(find(model, of), asked)
    there = {key: d for p in basis.parts for key, d in p.deltas.items() if isinstance(d, Coordinates)}
    if not there or there.keys() != given.keys():
        found = f"{len(given)} sites and {len(there)} with a subspace, which are not the same"
        raise GraftError(asked, found, "project adapters of the sites that were given to recycle")
    ranks = {a.shape[-2] for a, _ in given.values()}
    if len(ranks) > 1:
        raise GraftError(asked, f"ranks {sorted(ranks)}", "project adapters of one rank")
    (like,) = (p.method for p in basis.parts if isinstance(p.method, EigenLoRAx))
    method = EigenLoRAx(r=ranks.pop(), k=like.k, extra=like.extra, at=like.at)
    adapter, deltas = _made(model, name, method, given, 0)
    for key, delta in deltas.items():
        a, b = given[key]
        delta._buffers.update(there[key]._buffers)  # one subspace in memory, for all that live in it
        delta.down.copy_(a @ delta.basis_down.double().mT)
        delta.up.copy_(delta.basis_up.double().mT @ b)
    return _hung(model, adapter)


def _factors(adapter: Adapter, asked: str) -> Factors:
    deltas = [(key, d) for part in adapter.parts for key, d in part.deltas.items() if isinstance(d, WeightDelta)]
    found = {key: d.factors() for key, d in deltas if d.overrides("factors")}
    if not found:
        raise GraftError(asked, f"{adapter!r} has no low-rank updates", "name adapters such as gw.LoRA's")
    return {key: (pair[0].detach().double(), pair[1].detach().double()) for key, pair in found.items() if pair}


def _roles(adapter: Adapter) -> str:
    return ", ".join(dict.fromkeys(site.role for site in adapter.sites if site.role != "head"))


def _made(
    model: nn.Module, name: str, method: EigenLoRAx, given: Factors, seed: int
) -> tuple[Adapter, dict[str, Coordinates]]:
    body = body_of(model)
    check_free(model, body)
    check_name(model, name)
    sites = [body.sites[key] for key in given]
    part = build(method, sites, body.anatomy, torch.Generator().manual_seed(seed))
    return Adapter(name, [part]), {key: d for key, d in part.deltas.items() if isinstance(d, Coordinates)}


def _hung(model: nn.Module, adapter: Adapter) -> Adapter:
    attach(model, adapter, body_of(model))
    return adapter


def _directions(m: Tensor, k: int, extra: int, generator: torch.Generator, asked: str) -> Tensor:
    """[*batch, d, k + extra] with orthonormal columns: the principal ones of m [*batch, d, n], and random ones behind."""
    u, s, _ = torch.linalg.svd(m - m.mean(-1, keepdim=True), full_matrices=False)
    if s.shape[-1] < k or bool((s[..., k - 1] <= 1e-12 * s[..., 0]).any()):
        found = f"the centred factors have fewer than k={k} directions"
        raise GraftError(asked, found, "choose a smaller k, more extra, or more adapters")
    p = u[..., :k]
    more = torch.randn(*m.shape[:-1], extra, generator=generator, dtype=m.dtype).to(m.device)
    for _ in range(2):  # twice: the second takes out what rounding left
        more = more - p @ (p.mT @ more)
        more = torch.linalg.qr(more).Q
    return torch.cat([p, more], dim=-1)
