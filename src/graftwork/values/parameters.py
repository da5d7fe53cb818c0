"""Arithmetic on adapters' own tensors: averages (soups) of adapters of one method, whatever it is; sums, differences, negation.

Wortsman et al. 2022 (soups); Chronopoulou et al. 2023 (AdapterSoup); Zhang et al. 2023, "Composing Parameter-Efficient
Modules with Arithmetic Operations". Not the arithmetic of changes: for LoRA it has cross terms (see `combine`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Part
from ..core.errors import GraftError
from ..core.initial import Later, adopt
from ..grafting.graft import attach, build, check_name, find
from ..grafting.install import check_free
from ..grafting.root import body_of
from ..methods.weight.full import Full
from ..sites.body import Body
from .deviation import neutral
from .hold import inherit
from .options import check_weights, spelled
from .transport import aligned

# (one tensor per adapter, the value without effect, whether it is of a module trained as it is) -> the new tensor
Rule = Callable[[list[Tensor], Tensor | None, bool], Tensor]


@torch.no_grad()
def average(model: nn.Module, name: str, of: Sequence[str] | Mapping[str, float], *, align: bool = False) -> Adapter:
    """A new adapter whose every tensor is the mean of those of like adapters, of any method: theta = sum_i w_i theta_i.

    of: their names, or weights by name, at least 0, which are divided by their sum.
    align: first put the hidden units of each bottleneck or LoRA in the order of the first adapter's that they are nearest to
        (MerA: optimal transport, see `transport`); the order of hidden units means nothing.
    The same to the bit whatever the order of the names. One pass costs what one adapter costs; for a method that is not
    linear in its tensors it is not the mean of the adapters' outputs.
    Raises GraftError, with the model as it was, where methods, sites, shapes or head labels differ.
    """
    weights = of if isinstance(of, Mapping) else _uniform(of, name)
    weights = check_weights(weights, f"average {spelled(weights)}")
    asked = f"average {', '.join(weights)}"
    if min(weights.values()) < 0 or not sum(weights.values()):
        raise GraftError(
            asked, f"the weights {list(weights.values())}", "give at least 0, not all 0; see gw.arithmetic"
        )
    total = sum(weights.values())
    shares = {n: weights[n] / total for n in (weights if align else sorted(weights))}

    def mean(values: list[Tensor], start: Tensor | None, whole: bool) -> Tensor:
        return _sum(w * t for w, t in zip(shares.values(), values, strict=True))

    return _made(model, name, list(shares), mean, asked, {"of": dict(weights), "how": "average"}, align=align)


@torch.no_grad()
def arithmetic(model: nn.Module, name: str, weights: Mapping[str, float]) -> Adapter:
    """A new adapter by signed arithmetic on the tensors of like adapters.

    What the effect is proportional to (LoRA's B, l - 1 of IA3, a bottleneck's U) is summed as sum_e w_e x_e; all other
    tensors as sum_e |w_e| x_e, so that a difference negates the effect and not both factors of it; heads are averaged by |w_e|:
        add      {"a": lam, "b": 1 - lam}          analogy  {"a": c0, "b": c1, "c": -c1},  a + (b - c)
    Raises GraftError, with the model as it was, where methods, sites or shapes differ, or for a method whose effect is
    proportional to none of its tensors.  Source: arXiv 2306.14870; hkust-nlp/PEM_composition.
    """
    asked = f"add {spelled(weights)}"
    weights = check_weights(weights, asked)

    def total(values: list[Tensor], start: Tensor | None, whole: bool) -> Tensor:
        pairs = list(zip(weights.values(), values, strict=True))
        if start is None:
            return _sum(abs(w) * t for w, t in pairs) / (sum(abs(w) for w, _ in pairs) if whole else 1.0)
        return start + _sum(w * (t - start) for w, t in pairs)

    return _made(model, name, list(weights), total, asked, {"of": dict(weights), "how": "arithmetic"}, signed=True)


@torch.no_grad()
def scale(model: nn.Module, name: str, of: str, factor: float) -> Adapter:
    """A new adapter with `factor` times the effect of the adapter `of`; -1 negates it: B -> -B of LoRA, l -> 2 - l of IA3.

    Raises GraftError as `arithmetic`. Negating twice gives the same bits for LoRA and bottlenecks, and for IA3 up to one
    rounding of 2 - l.
    """
    asked = f"scale {of!r} by {factor}"
    factor = check_weights({of: factor}, asked)[of]

    def times(values: list[Tensor], start: Tensor | None, whole: bool) -> Tensor:
        (t,) = values
        return t if start is None else start + factor * (t - start)

    return _made(model, name, [of], times, asked, {"of": {of: factor}, "how": "scale"}, signed=True)


def _uniform(names: Sequence[str], name: str) -> dict[str, float]:
    if isinstance(names, str) or not names or not all(isinstance(n, str) for n in names):
        raise GraftError(f"average {names!r} as {name!r}", "not a list of adapters", "give their names, ['a', 'b']")
    if len(set(names)) < len(names):
        raise GraftError(f"average {', '.join(names)}", "an adapter stands in it twice", "give it a weight instead")
    return dict.fromkeys(names, 1.0)


def _made(
    model: nn.Module,
    name: str,
    names: Sequence[str],
    rule: Rule,
    asked: str,
    recipe: Mapping[str, object],
    signed: bool = False,
    align: bool = False,
) -> Adapter:
    """The adapter whose tensors `rule` makes of those of the adapters `names`. signed: their neutral values are asked for."""
    body = body_of(model)
    check_free(model, body)
    check_name(model, name)
    adapters = [find(model, n) for n in names]
    check_alike(adapters, asked)
    made = Adapter(
        name,
        [_part(parts, rule, body, asked, signed, align) for parts in zip(*(a.parts for a in adapters), strict=True)],
    )
    made.trainable = False
    inherit(made, adapters)
    made.metadata["composed"] = dict(recipe)
    attach(model, made, body)
    return made


def _part(parts: Sequence[Part], rule: Rule, body: Body, asked: str, signed: bool, align: bool) -> Part:
    first = parts[0]
    whole = isinstance(first.method, Full)
    new = build(first.method, [body.sites[site.key] for site in first.sites], body.anatomy, Later())
    shared = [_tensors(part.shared_modules) for part in parts]
    if signed and any(not torch.equal(t[n], shared[0][n]) for t in shared for n in t):
        raise GraftError(asked, f"{first.method.name}: what its sites share differs", "use gw.combine, or gw.average")
    if shared[0]:
        adopt(new.shared_modules, shared[0] if signed else _ruled(shared, {}, rule, whole, asked))
    for key, delta in new.deltas.items():
        deltas = [part.deltas[key] for part in parts]
        start = neutral(deltas[0], asked) if signed else {}
        tensors = [_tensors(d) for d in deltas]
        if align:
            tensors = [tensors[0], *(aligned(tensors[0], other, deltas[0]) for other in tensors[1:])]
        delta.restore(_ruled(tensors, start, rule, whole, asked))
    return new


def _ruled(
    tensors: Sequence[Mapping[str, Tensor]], start: Mapping[str, Tensor], rule: Rule, whole: bool, asked: str
) -> dict[str, Tensor]:
    out = {}
    for n, one in tensors[0].items():
        values = [t[n] for t in tensors]
        if not one.is_floating_point():
            if any(not torch.equal(one, other) for other in values):
                raise GraftError(asked, f"whole numbers in {n!r} that differ", "they have no mean")
            out[n] = one
        else:
            out[n] = rule(values, start.get(n), whole).to(one.dtype)
    return out


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its tensors by name, real numbers in float64 on the CPU."""
    values = {n: t.detach().cpu() for n, t in module.state_dict().items()}
    return {n: t.double() if t.is_floating_point() else t for n, t in values.items()}


def check_alike(adapters: Sequence[Adapter], asked: str) -> None:
    """GraftError unless all have the same methods, sites, shapes and labels."""
    first = adapters[0]
    do = "use gw.combine, which works on what adapters do to the weights"
    if not all(method.mergeable for adapter in adapters for method in adapter.methods):
        do = "adapters that differ can run together, gw.activate(model, '0.5*a + 0.5*b'), and be kept so by gw.save"
    for other in adapters[1:]:
        here, there = ([replace(m, at=first.methods[0].at, layers=None) for m in a.methods] for a in (first, other))
        if here != there:
            text = [" + ".join(map(str, a.methods)) for a in (first, other)]
            raise GraftError(asked, f"{first.name!r} is {text[0]}, {other.name!r} is {text[1]}", do)
        mine, theirs = first.state_dict(), other.state_dict()
        if mine.keys() != theirs.keys():
            odd = sorted(mine.keys() ^ theirs.keys())[0]
            raise GraftError(asked, f"other sites: only one of {first.name!r} and {other.name!r} has {odd!r}", do)
        for n, t in mine.items():
            if t.shape != theirs[n].shape:
                found = f"{n!r}: {list(t.shape)} in {first.name!r}, {list(theirs[n].shape)} in {other.name!r}"
                raise GraftError(asked, found, do)
        if first.labels != other.labels:
            raise GraftError(asked, f"labels {first.labels} and {other.labels}", "average adapters of one task")


def _sum(terms: object) -> Tensor:
    total = sum(terms)  # type: ignore[call-overload]
    assert isinstance(total, Tensor)
    return total
