"""Where adapters change the weights of their backbone, and what they do there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import Adapter
from ..core.delta import WeightDelta
from ..core.errors import GraftError
from ..core.site import Site
from ..grafting.merge import delta_mergeable
from ..methods.weight.full import Values
from ..sites.body import Body
from .change import Change


@dataclass(frozen=True)
class Place:
    """One parameter, or a slice of its rows, that some of the adapters change.

    site: stands for it;  param: the parameter's name;  chains: an adapter's deltas there, first applied first.
    """

    site: Site
    param: str
    chains: dict[str, list[WeightDelta]]

    @property
    def stored(self) -> Tensor | None:
        """The backbone's own value of the whole parameter."""
        value = self.site.module._parameters.get(self.param)
        weight = value is not None and self.param == self.site.param
        return None if value is None else (self.site.weight.decoded(value) if weight else value).detach()

    def change(self, name: str) -> Change:
        """What the adapter `name` does to this weight."""
        rows, chain = self.site.rows, self.chains[name]
        pairs = [(delta, delta.factors()) for delta in chain]
        thin = [(d.view.rows, *pair) for d, pair in pairs if pair is not None]
        if len(thin) == len(chain):
            down = torch.cat([_plain(a) for _, a, _ in thin], dim=-2)
            ups = [_plain(b) if at == rows else _within(_plain(b), at, self.site) for at, _, b in thin]
            return Change(down, torch.cat(ups, dim=-1))
        stored = self.stored
        assert stored is not None
        start = _plain(torch.zeros_like(stored) if all(delta.additive for delta in chain) else stored)
        new = adapted(chain, self.param, start)
        assert new is not None
        if new.shape != start.shape:
            found = f"{list(new.shape)} in the place of {list(start.shape)} at {self.site.key}"
            do = "LoRA holds updates of matrices that keep their shape"
            raise GraftError(f"the change of a weight by {name!r}", found, do)
        return Change(matrix=self.site.weight.dense(new - start))

    def shift(self, name: str) -> Tensor:
        """What the adapter `name` adds to this vector, which is zero where the host has none."""
        stored = self.stored
        start = None if stored is None else _plain(stored)
        new = adapted(self.chains[name], self.param, start)
        if new is None:
            return torch.zeros(self.site.weight.d_out, dtype=torch.float64)
        return new if start is None else new - start


@dataclass(frozen=True)
class Places:
    """Where some adapters act: on matrices, on vectors (biases, gains), and on modules whose values they replace.

    whole: those that every adapter which acts there trains as they are (`full`): heads, above all; the last of a chain counts.
    """

    matrices: list[Place]
    vectors: list[Place]
    whole: list[Place]


Chains = dict[tuple[str, str], dict[str, list[WeightDelta]]]
TOGETHER = (
    "average adapters of one method (gw.average, --how average); others run together: gw.activate, compose --recipe"
)


def chains_of(adapters: Sequence[Adapter], asked: str, do: str = TOGETHER) -> Chains:
    """Each adapter's deltas, first applied first, by (module path, parameter) and the adapter's name.

    GraftError where a method changes activations: then there is no dW. do: what it says then.
    """
    chains: Chains = {}
    for adapter in adapters:
        for part in adapter.parts:
            for site in part.sites:
                delta = part.deltas[site.key]
                if not (isinstance(delta, WeightDelta) and part.method.mergeable and delta_mergeable(delta)):
                    found = f"{part.method.name} at {site.key} changes activations, not a weight (in {adapter.name!r})"
                    raise GraftError(asked, found, do)
                for param in delta.names():
                    chains.setdefault((site.path, param), {}).setdefault(adapter.name, []).append(delta)
    return chains


def places(adapters: Sequence[Adapter], body: Body, asked: str) -> Places:
    """GraftError as `chains_of`; and for a backbone without values."""
    chains = chains_of(adapters, asked)
    sites: dict[str, list[Site]] = {}
    for site in (site for adapter in adapters for site in adapter.sites):
        sites.setdefault(site.path, []).append(site)
    whole = _whole(chains)
    found_places = Places([], [], [])
    for (path, param), by_name in chains.items():
        place = Place(site_of(body, sites[path], path, param, None), param, by_name)
        if place.stored is not None and place.stored.is_meta:
            raise GraftError(asked, f"{path}.{param} is on the meta device", "give the model its weights first")
        if path in whole:
            found_places.whole.append(place)
        elif place.stored is None or place.stored.dim() < 2:
            found_places.vectors.append(place)
        else:
            found_places.matrices.extend(_split(place, body, sites[path]))
    return found_places


def _whole(chains: Chains) -> set[str]:
    paths = {path for path, _ in chains}
    for (path, _), by_name in chains.items():
        if not all(isinstance(delta, Values) for chain in by_name.values() for delta in chain):
            paths.discard(path)
    return paths


def _split(place: Place, body: Body, sites: Sequence[Site]) -> list[Place]:
    """One place for each slice of the rows that all adapters take alike, or the whole weight."""
    slices = {delta.view.rows for chain in place.chains.values() for delta in chain}
    spans = sorted(span for span in slices if span is not None)
    apart = all(one[1] <= other[0] for one, other in pairwise(spans))
    if None in slices or not apart:
        return [place]
    out = []
    for span in spans:
        chains = {n: [d for d in chain if d.view.rows == span] for n, chain in place.chains.items()}
        site = site_of(body, sites, place.site.path, place.param, span)
        out.append(Place(site, place.param, {n: chain for n, chain in chains.items() if chain}))
    return out


def site_of(body: Body, own: Sequence[Site], path: str, param: str, rows: tuple[int, int] | None) -> Site:
    """The site of a parameter or a slice of it: one of the adapters' own, or the first of the backbone's; of a bias that of its weight."""
    known = [*own, *(s for s in body.anatomy.sites if s.path == path)]
    for fits in (lambda s: s.param == param, lambda s: s.weight.bias == param, lambda s: True):
        for site in known:
            if site.rows == rows and site.module._parameters.get(site.param) is not None and fits(site):
                return site
    return known[0]


def adapted(chain: Sequence[WeightDelta], name: str, value: Tensor | None) -> Tensor | None:
    """What the chain makes of a host's parameter, in float64 on the CPU; the deltas are left as they are."""
    for delta in chain:
        twin = copy.deepcopy(delta, {id(own): own for own in (delta.runtime, delta.view.codes)})
        for source in twin.sources():
            source.to("cpu", torch.float64)
        value = twin.adapted(name, value)
    return None if value is None else _plain(value)


def _plain(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)


def _within(up: Tensor, rows: tuple[int, int] | None, site: Site) -> Tensor:
    """The factor of a slice of the rows as one of all rows."""
    assert rows is not None
    return F.pad(up, (0, 0, rows[0], site.weight.d_out - rows[1]))
