"""Any adapter of weights as plain LoRA, for engines that read nothing else: one rank, alpha = rank, no dropout.

An update dW = W' - W of rank at most r is exactly B A. Any other is cut by its singular value decomposition, which loses
least of it in the Frobenius norm: |dW - B A|^2 is the sum of the squared singular values left out (Eckart and Young 1936).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Part
from ..core.body import Body
from ..core.delta import WeightDelta
from ..core.errors import GraftError
from ..core.graft import build, find
from ..core.initial import Later
from ..core.install import check_free
from ..core.merge import delta_mergeable
from ..core.root import body_of
from ..core.site import Site
from ..methods.weight.full import Full
from ..methods.weight.lora import LoRA
from ..store.save import checked
from .places import whole_site
from .spectrum import Spectrum, of_factors, of_matrix

EXACT = 1e-5  # a relative error that the rounding of float32 explains
Chains = dict[tuple[str, str], list[WeightDelta]]


@dataclass(frozen=True)
class Refactored:
    """One weight as LoRA.  shape: (out, in) of its dense view.  needed: the rank of its update.  kept: of which this many.

    error: |dW - B A| / |dW| in the Frobenius norm, of B and A as they are stored.
    """

    site: str
    shape: tuple[int, int]
    needed: int
    kept: int
    error: float


@torch.no_grad()
def plain_lora(
    model: nn.Module, name: str, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, list[Refactored]]:
    """(the adapter `name` as LoRA of one rank for all its weights, what that loses at each). The model is left as it is.

    rank: at most so many; None and no energy: as many as the update has.  energy: keep this share of the squared norm of
    every update, by as few as that takes. A head that is trained whole (`full`) stays as it is.
    Raises GraftError for a method that changes activations, vectors or only biases, and where an update is not of low rank
    and neither `rank` nor `energy` says how much of it to keep.
    """
    asked, adapter, body = f"{name!r} as LoRA", find(model, name), body_of(model)
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise GraftError(asked, f"rank={rank}, energy={energy}", "give a rank of 1 or more, or an energy in (0, 1]")
    check_free(model, body)
    for key, value in adapter.named_parameters():
        checked(adapter, key, value)
    heads = [p for p in adapter.parts if isinstance(p.method, Full) and all(s.role == "head" for s in p.sites)]
    chains = _chains([part for part in adapter.parts if part not in heads], asked)
    updates = list(_updates(chains, body, asked))
    if not chains:
        raise GraftError(asked, "it adapts no weight", "LoRA holds updates of matrices")
    shifts = _shifts(chains, [site for site, _, _ in updates], body, asked)
    spectra = [_spectrum(*update, asked) for update in updates]
    for one in spectra if rank is None and energy is None else ():
        (out, into), needed = one.site.weight.shape[-2:], one.needed
        if not one.cheap and needed * (out + into) > out * into:
            found = f"the update at {one.site.key} [{out}, {into}] has rank {needed}, as LoRA larger than the weight"
            raise GraftError(asked, found, "say how much to keep: rank=16 (--rank 16) or energy=0.99 (--energy 0.99)")
    kept = [one.rank(rank, energy) for one in spectra]
    return _made(adapter, heads, spectra, kept, shifts, body)


def in_words(rows: Sequence[Refactored]) -> str:
    """What is lost, for a warning; the empty text where it is rounding only."""
    worst, mean = max(rows, key=lambda row: row.error), sum(row.error for row in rows) / len(rows)
    if worst.error <= EXACT:
        return ""
    return f"as LoRA the updates are off by {mean:.2g} of their norm on average, {worst.error:.2g} at {worst.site}"


def _chains(parts: Sequence[Part], asked: str) -> Chains:
    """The deltas of each parameter, first applied first."""
    out: Chains = {}
    for part in parts:
        for site in part.sites:
            delta = part.deltas[site.key]
            if not (isinstance(delta, WeightDelta) and part.method.mergeable and delta_mergeable(delta)):
                found = f"{part.method.name} at {site.key} changes activations, not a weight"
                raise GraftError(asked, found, "only methods that can be merged are LoRA, exactly or nearly")
            for name in delta.names():
                out.setdefault((site.path, name), []).append(delta)
    return out


def _updates(chains: Chains, body: Body, asked: str) -> Iterator[tuple[Site, list[WeightDelta], Tensor]]:
    """Every adapted matrix with its deltas and its stored value."""
    for (path, name), chain in chains.items():
        stored = body.modules[path]._parameters.get(name)
        if stored is not None and stored.is_meta:
            raise GraftError(asked, f"{path}.{name} is on the meta device", "give the model its weights first")
        if stored is not None and stored.dim() > 1:
            yield whole_site(body, path, asked, name), chain, stored.detach()


def _shifts(chains: Chains, sites: Sequence[Site], body: Body, asked: str) -> dict[str, Tensor]:
    """What is added to the biases of these sites, by site key. GraftError for any other vector that is adapted."""
    homes = {(site.path, site.weight.bias): site for site in sites if site.weight.bias and not site.weight.batch}
    out = {}
    for (path, name), chain in chains.items():
        stored = body.modules[path]._parameters.get(name)
        if stored is not None and stored.dim() > 1:
            continue
        new = _adapted(chain, name, stored)
        if new is None:  # there was no bias, and is none
            continue
        if (path, name) not in homes:
            what = "a bias whose weight is not" if "bias" in name else "a vector that is"
            do = "LoRA holds updates of matrices, and shifts of their biases"
            raise GraftError(asked, f"{path}.{name}, {what} adapted", do)
        out[homes[path, name].key] = new if stored is None else new - stored.double()
    return out


def _adapted(chain: Sequence[WeightDelta], name: str, value: Tensor | None) -> Tensor | None:
    """What the chain makes of a parameter, in float64."""
    made = None if value is None else value.double()
    for delta in chain:
        twin = copy.deepcopy(delta, {id(delta.runtime): delta.runtime})
        for source in twin.sources():
            source.double()
        made = twin.adapted(name, made)
    return None if made is None else made.double()


def _spectrum(site: Site, chain: Sequence[WeightDelta], stored: Tensor, asked: str) -> Spectrum:
    pairs = [delta.factors() if delta.view.rows is None else None for delta in chain]
    known = [pair for pair in pairs if pair is not None]
    if len(known) == len(pairs):
        down, up = torch.cat([a for a, _ in known], dim=-2), torch.cat([b for _, b in known], dim=-1)
        return of_factors(site, down.double().cpu(), up.double().cpu())
    start = torch.zeros_like(stored) if all(delta.additive for delta in chain) else stored
    new = _adapted(chain, site.weight.name, start)
    assert new is not None
    if new.shape != start.shape:
        found = f"{list(new.shape)} in the place of {list(start.shape)} at {site.key}"
        raise GraftError(asked, found, "LoRA holds updates of matrices that keep their shape")
    return of_matrix(site, site.weight.dense(new - start.double()).cpu())


def _made(
    adapter: Adapter,
    heads: Sequence[Part],
    spectra: Sequence[Spectrum],
    kept: Sequence[int],
    shifts: Mapping[str, Tensor],
    body: Body,
) -> tuple[Adapter, list[Refactored]]:
    r = max([1, *kept])
    roles = dict.fromkeys(one.site.role for one in spectra)
    method = LoRA(r=r, alpha=float(r), bias=bool(shifts), at=", ".join(roles))
    part, rows = build(method, [one.site for one in spectra], body.anatomy, Later()), []
    for one, k in zip(spectra, kept, strict=True):
        down, up = one.factors(k, r)
        delta = part.deltas[one.site.key]
        shift = shifts.get(one.site.key, up.new_zeros(up.shape[-2]))
        delta.restore({"down": down, "up": up} | ({"shift": shift} if shifts else {}))
        dense, own = one.dense(), {n: p.detach().cpu().double() for n, p in delta.named_parameters()}
        lost, whole = dense - own["up"] @ own["down"], float(dense.norm())
        error = float(lost.norm()) / whole if whole else 0.0
        rows.append(Refactored(one.site.key, one.site.weight.shape[-2:], one.needed, k, error))  # type: ignore[arg-type]
    made = Adapter(adapter.name, [part, *heads])
    made.labels, made.metadata = adapter.labels, adapter.metadata
    return made, rows
