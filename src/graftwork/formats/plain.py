"""Any adapter of weights as plain LoRA, for engines that read nothing else: one rank, alpha = rank, no dropout.

An update dW = W' - W of rank at most r is exactly B A. Any other is cut by its singular value decomposition, which loses
least of it in the Frobenius norm: |dW - B A|^2 is the sum of the squared singular values left out (Eckart and Young 1936).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Part
from ..core.errors import GraftError
from ..core.initial import Later
from ..core.site import Site
from ..grafting.graft import build, find
from ..grafting.install import check_free
from ..grafting.root import body_of
from ..methods.weight.full import Full
from ..methods.weight.lora import LoRA
from ..products.spectrum import Spectrum
from ..sites.body import Body
from ..store.save import checked
from ..values.change import Change
from ..values.options import is_rank, is_share
from ..values.places import Chains, Place, adapted, chains_of
from .places import whole_site

EXACT = 1e-5  # a relative error that the rounding of float32 explains


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
    if (rank is not None and not is_rank(rank)) or (energy is not None and not is_share(energy)):
        raise GraftError(asked, f"rank={rank}, energy={energy}", "give a rank of 1 or more, or an energy in (0, 1]")
    check_free(model, body)
    for key, value in adapter.named_parameters():
        checked(adapter, key, value)
    heads = [p for p in adapter.parts if isinstance(p.method, Full) and all(s.role == "head" for s in p.sites)]
    rest = Adapter(name, [part for part in adapter.parts if part not in heads])
    chains = chains_of([rest], asked, "only methods that can be merged are LoRA, exactly or nearly")
    updates = list(_updates(chains, body, asked))
    if not chains:
        raise GraftError(asked, "it adapts no weight", "LoRA holds updates of matrices")
    shifts = _shifts(chains, [site for site, _ in updates], body, asked)
    for site, update in updates if rank is None and energy is None else ():
        if update.too_large:
            (out, into), needed = site.weight.shape[-2:], update.spectrum.needed
            found = f"the update at {site.key} [{out}, {into}] has rank {needed}, as LoRA larger than the weight"
            raise GraftError(asked, found, "say how much to keep: rank=16 (--rank 16) or energy=0.99 (--energy 0.99)")
    kept = [(site, update.spectrum, update.spectrum.rank(rank, energy)) for site, update in updates]
    return _made(adapter, heads, kept, shifts, body)


def in_words(rows: Sequence[Refactored]) -> str:
    """What is lost, for a warning; the empty text where it is rounding only."""
    worst, mean = max(rows, key=lambda row: row.error), sum(row.error for row in rows) / len(rows)
    if worst.error <= EXACT:
        return ""
    return f"as LoRA the updates are off by {mean:.2g} of their norm on average, {worst.error:.2g} at {worst.site}"


def _updates(chains: Chains, body: Body, asked: str) -> Iterator[tuple[Site, Change]]:
    """Every adapted matrix with its update."""
    for (path, param), chain in chains.items():
        stored = body.modules[path]._parameters.get(param)
        if stored is not None and stored.is_meta:
            raise GraftError(asked, f"{path}.{param} is on the meta device", "give the model its weights first")
        if stored is not None and stored.dim() > 1:
            site = whole_site(body, path, asked, param)
            yield site, Place(site, param, chain).change(*chain)


def _shifts(chains: Chains, sites: Sequence[Site], body: Body, asked: str) -> dict[str, Tensor]:
    """What is added to the biases of these sites, by site key. GraftError for any other vector that is adapted."""
    homes = {(site.path, site.weight.bias): site for site in sites if site.weight.bias and not site.weight.batch}
    out = {}
    for (path, name), chain in chains.items():
        stored = body.modules[path]._parameters.get(name)
        if stored is not None and stored.dim() > 1:
            continue
        (deltas,) = chain.values()
        old = None if stored is None else stored.detach().to("cpu", torch.float64)
        new = adapted(deltas, name, old)
        if new is None:  # there was no bias, and is none
            continue
        if (path, name) not in homes:
            what = "a bias whose weight is not" if "bias" in name else "a vector that is"
            do = "LoRA holds updates of matrices, and shifts of their biases"
            raise GraftError(asked, f"{path}.{name}, {what} adapted", do)
        out[homes[path, name].key] = new if old is None else new - old
    return out


def _made(
    adapter: Adapter,
    heads: Sequence[Part],
    spectra: Sequence[tuple[Site, Spectrum, int]],
    shifts: Mapping[str, Tensor],
    body: Body,
) -> tuple[Adapter, list[Refactored]]:
    sites, r = [site for site, _, _ in spectra], max([1, *(k for _, _, k in spectra)])
    method = LoRA(r=r, alpha=float(r), bias=bool(shifts), at=", ".join(dict.fromkeys(site.role for site in sites)))
    part, rows = build(method, sites, body.anatomy, Later()), []
    for site, one, k in spectra:
        down, up = one.factors(k, r)
        delta = part.deltas[site.key]
        shift = shifts.get(site.key, up.new_zeros(up.shape[-2]))
        delta.restore({"down": down, "up": up} | ({"shift": shift} if shifts else {}))
        own = {n: p.detach().cpu().double() for n, p in delta.named_parameters()}
        lost, whole = one.dense - own["up"] @ own["down"], float(one.dense.norm())
        error = float(lost.norm()) / whole if whole else 0.0
        rows.append(Refactored(site.key, site.weight.shape[-2:], one.needed, k, error))  # type: ignore[arg-type]
    made = Adapter(adapter.name, [part, *heads])
    made.labels, made.metadata = adapter.labels, adapter.metadata
    return made, rows
