"""From expressions per row to groups of deltas: at each site, what is alike goes into one group (see `rows`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..core.adapter import Adapter
from ..core.delta import Delta, WeightDelta
from ..core.errors import GraftError
from ..core.method import Method
from ..core.passes import Runtime
from ..core.plan import channels_first, disjoint, vectors, whole
from ..core.site import Site
from ..expressions.algebra import Rows
from ..expressions.mixed import MixedWeight
from ..expressions.pieces import compiled
from ..expressions.places import Move, deltas_of
from ..expressions.sums import EnterSum, OutputSum
from .likeness import like
from .rows import Table, check_order, tensors_of
from .rowwise import Denses, Diagonals, Lookups, LowRanks
from .together import Attends, Forwards, Linears

# numbers: weights of all rows together that are made at once (128 MiB in float32); larger ones run one adapter at a time
LARGEST = 2**25
AFFINE = (nn.Linear, _ConvNd, nn.LayerNorm, nn.GroupNorm, _BatchNorm, nn.Embedding)  # y = f(x) + bias, or without one

Members = dict[int, Delta]  # number of the expression -> its delta


@torch.no_grad()
def table(modules: Mapping[str, nn.Module], rows: Rows, adapters: Mapping[str, Adapter], runtime: Runtime) -> Table:
    """Everything that `rows` does in a backbone of these modules. GraftError where a method cannot run row by row."""
    made = Table([None if e is None else str(e) for e in rows.of], runtime)
    if made.uniform:
        return made
    distinct = sorted({str(e): e for e in rows.of if e is not None}.items())
    chains = [compiled(e, adapters, modules) for _, e in distinct]
    moves = [move for chain in chains for move in chain]
    parts = dict.fromkeys(part for move in moves for part in move.parts)
    held = {id(t): t for t in tensors_of([*(d for _, d in deltas_of(moves)), *(p.shared_modules for p in parts)])}
    made.parameters = [t for t in held.values() if not t.is_inference()]  # those have no version, and never change
    made.dropping = next((str(p.method) for p in parts if drops(p.method)), None)
    weights: dict[str, dict[int, list[tuple[Site, Any]]]] = {}
    spoken: dict[int, str] = {}  # what a refusal calls a delta
    attends: dict[str, tuple[Site, dict[int, list[Delta]]]] = {}
    for slot in slots(chains):
        for site, members in sites(slot):
            for n, delta in members.items():
                spoken[id(delta)] = slot[n].text
                if (isinstance(delta, OutputSum) and delta.readers) or isinstance(delta, EnterSum):
                    raise refusal(slot[n].text, site, distinct[n][0], "it adds up edits that read different inputs")
                if delta.overrides("around"):
                    raise refusal(spoken[id(delta)], site, distinct[n][0], "it changes the whole pass of a module")
                if isinstance(delta, WeightDelta | MixedWeight) and delta.names():
                    weights.setdefault(site.path, {}).setdefault(n, []).append((site, delta))
                if delta.overrides("attend"):
                    attends.setdefault(site.path, (site, {}))[1].setdefault(n, []).append(delta)
            edits = {n: d for n, d in members.items() if any(map(d.overrides, ("forward", "enter", "amend")))}
            made.deltas += [(site, group) for group in _forwards(made, site, edits)]
    made.deltas += [(site, Attends(made, site.key, members)) for site, members in attends.values()]
    for path, chains_here in weights.items():
        module = modules[path]
        for n, chain in chains_here.items():
            if not fast(module, [d for _, d in chain]) and not whole(module, chain[0][0]):
                found = f"a weight inside {type(module).__name__}, which cannot be applied row by row"
                raise refusal(spoken[id(chain[0][1])], chain[0][0], distinct[n][0], found)
        made.steps += [(path, step) for step in _steps(made, module, chains_here)]
    check_order(modules, [*weights, *(site.path for site, _ in made.deltas)])
    made.prune()
    return made


def drops(method: Method) -> bool:
    """Whether it has dropout."""
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return any(bool(v) for name, v in values.items() if name.endswith(("dropout", "drop_path"))) or any(
        drops(v) for v in values.values() if isinstance(v, Method)
    )


def refusal(what: str, site: Site, text: str, found: str) -> GraftError:
    """A method that cannot run row by row."""
    do = f"give the rows of {text} a batch of their own, with gw.using(model, {text!r})"
    return GraftError(f"one adapter per row: {what} at {site.key}", found, do)


def slots(chains: Sequence[Sequence[Move]]) -> list[dict[int, Move]]:
    """The steps of all chains side by side, like ones in one slot, each chain in its own order."""
    out: list[dict[int, Move]] = []
    for n, chain in enumerate(chains):
        at = 0
        for move in chain:
            same = (i for i in range(at, len(out)) if next(iter(out[i].values())).label == move.label)
            i = next(same, None)
            if i is None:
                i = at
                out.insert(i, {})
            out[i][n] = move
            at = i + 1
    return out


def sites(slot: Mapping[int, Move]) -> Iterator[tuple[Site, Members]]:
    """The sites of a slot, each with the deltas that are there; a sum may have several at one site, in order."""
    found: dict[tuple[str, int], tuple[Site, Members]] = {}
    for n, move in slot.items():
        seen: Counter[str] = Counter()
        for site, delta in move.pieces:
            found.setdefault((site.key, seen[site.key]), (site, {}))[1][n] = delta
            seen[site.key] += 1
    return iter(found.values())


def _forwards(made: Table, site: Site, members: Members) -> Iterator[Forwards]:
    for group, slots_of in _alike(members):
        one = Forwards(made, site.key, group)
        one.source = next(iter(group.values())).source
        one.setup(slots_of, apart=any(d.overrides("enter") or d.itself for d in group.values()))
        yield one


def _alike(members: Members) -> Iterator[tuple[Members, list[Any]]]:
    """The members in groups of one function each, with the slots of their tensors."""
    groups: dict[Any, tuple[Members, list[Any]]] = {}
    for n, delta in members.items():
        kind, where = like(delta)
        group = groups.setdefault(kind, ({}, []))
        group[0][n] = delta
        group[1].append(where)
    return iter(groups.values())


def _steps(made: Table, module: nn.Module, chains: Mapping[int, list[tuple[Site, WeightDelta]]]) -> Iterator[Any]:
    """The steps of one module's weights: first by their fast forms, then, whole weights for the chains that have none."""
    grouped: dict[tuple[str, str, int], Members] = {}
    dense: dict[int, list[WeightDelta]] = {}
    for n, chain in chains.items():
        kinds = fast(module, [d for _, d in chain])
        if not kinds:
            dense[n] = [d for _, d in chain]
        for i, ((site, delta), kind) in enumerate(zip(chain if kinds else (), kinds, strict=True)):
            grouped.setdefault((kind, site.key, i), {})[n] = delta
    for (kind, key, _), members in sorted(grouped.items(), key=lambda item: item[0][2]):  # in each chain's own order
        names = tuple(dict.fromkeys(name for d in members.values() for name in d.names()))  # type: ignore[operator]
        if kind == "factors":
            yield LowRanks(made, key, members, names)
        elif kind == "lookup":
            yield Lookups(made, key, members, names, module)
        elif kind == "diagonal":
            yield Diagonals(made, key, members, names, channels_first(module))
        else:
            for group, slots_of in _alike(members):
                step = Linears(made, key, group, names)
                step.host = module
                step.setup(slots_of, apart=any(d.itself for d in group.values()))
                yield step
    if dense:
        yield _dense(made, module, next(iter(chains.values()))[0][0], dense)


def fast(module: nn.Module, deltas: Sequence[WeightDelta]) -> list[str]:
    """The forms of one adapter's deltas on a module, or nothing where they do not all have one that the others allow."""
    if any(d.overrides("product") for d in deltas):
        return []
    kinds = [form(module, d) for d in deltas]
    free = all(d.additive for d in deltas[1:]) or disjoint(list(deltas))  # the first sees the backbone's own product
    return kinds if free and "" not in kinds else []


def form(module: nn.Module, delta: WeightDelta) -> str:
    """The fastest form of a weight delta: "factors", "lookup", "diagonal", "linear", or "" for a weight as a whole.

    The first three are stacked once for many passes, so that they must not depend on the pass.
    """
    factors = delta.lasting and delta.overrides("factors")
    affine = delta.lasting and delta.overrides("diagonal") and (isinstance(module, AFFINE) or delta.view.linear)
    diagonal = delta.diagonal() if affine else None
    if delta.view.linear:
        if factors:
            return "factors"
        if diagonal is not None and (diagonal[0] is None or delta.view.rows is None):
            return "diagonal"
        return "linear" if delta.overrides("linear") else ""
    if diagonal is not None and diagonal[0] is None and delta.view.rows is None:
        return "diagonal"
    looked_up = delta.view.lookup and isinstance(module, nn.Embedding) and module.max_norm is None
    return "lookup" if looked_up and factors else ""


def _dense(made: Table, module: nn.Module, site: Site, members: dict[int, list[WeightDelta]]) -> Denses:
    names = tuple(dict.fromkeys(name for chain in members.values() for d in chain for name in d.names()))
    if site.weight.codes is not None and site.weight.name in names:
        found = "the backbone holds it quantised, and its own layer runs with no other weight"
        raise GraftError(f"one weight per row at {site.key}", found, "activate one adapter at a time for its rows")
    step = Denses(made, site.key, members, names, module, together=False)
    if any(d.overrides("product") for chain in members.values() for d in chain):
        return step  # what is mixed has the shape of what the module gives
    shapes = {tuple(None if v is None else tuple(v.shape) for v in step.values(chain)) for chain in step.deltas}
    if not step.whole or len(members) < len(set(made.index)):
        shapes.add(tuple(None if (p := module._parameters[n]) is None else tuple(p.shape) for n in names))
    if len(shapes) > 1:
        found = " and ".join(sorted(str([list(s) for s in shape if s is not None]) for shape in shapes))
        do = "rows of one batch share one output tensor: run those of each size as a batch of their own, with gw.using"
        raise GraftError(f"one adapter per row at {site.key}", f"weights of different shapes, {found}", do)
    numbers = sum(torch.Size(s).numel() for s in next(iter(shapes)) if s is not None) * len(step.covered)
    lasting = all(d.lasting for chain in members.values() for d in chain)
    step.together = lasting and numbers <= LARGEST and (vectors(module) or site.weight.linear)
    return step
