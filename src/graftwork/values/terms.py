"""An expression over adapters of weights as the weighted sum that it is: sum_e w_e dW_e, e an adapter or a stack of adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..core.adapter import Adapter, Part
from ..core.delta import WeightDelta
from ..core.errors import GraftError
from ..expressions.algebra import A, Drop, Expr, Mean, Stack, Sum, add, as_expr, linear
from ..grafting.graft import adapters, find
from ..sites.where import in_layers
from .options import check_weights


def terms(model: nn.Module, of: Mapping[str, float] | Expr | str, asked: str) -> dict[str, tuple[float, Adapter]]:
    """(w_e, e) by the text of e; a stack as one adapter whose deltas act one after the other, with the last one's head.

    of: weights by name, or an expression: sums, means, differences, stacks and `drop`, nested. A sum inside of a stack has
    a change of its own only where every adapter of the stack adds something to the weights that does not depend on them.
    Raises GraftError for an adapter that the model has not, and for expressions without one change of each weight.
    """
    if not isinstance(of, Expr | str):
        return {n: (w, find(model, n)) for n, w in check_weights(of, asked).items()}
    e = A(of) if isinstance(of, str) and of in adapters(model) else as_expr(of)
    for n in e.names():
        find(model, n)
    flat = linear(add(*_expanded(model, e, asked)))
    if not flat:
        raise GraftError(asked, "it adds up to nothing: that is the backbone", "leave it out")
    return {t.name if isinstance(t, A) else str(t): (c, _one(model, t)) for c, t in flat}


def _expanded(model: nn.Module, e: Expr, asked: str) -> list[tuple[float, Expr]]:
    """Pairs (c, t) that add up to e; t is an adapter, or made of adapters by stacks and `drop` alone."""
    if isinstance(e, A):
        return [(1.0, e)]
    if isinstance(e, Sum | Mean):
        return [(c * inner, t) for c, part in linear(e) for inner, t in _expanded(model, part, asked)]
    if isinstance(e, Drop):
        sites = [site for n in e.names() for site in find(model, n).sites]
        in_layers(sites, e.layers)  # refuses layers in which none of them is
        return [(c, Drop(t, e.layers)) for c, t in _expanded(model, e.of, asked)]
    if not isinstance(e, Stack):
        raise GraftError(asked, f"{e} has no one change of each weight", "compose sums, means, differences and stacks")
    if len({n for t in e.of for n in t.names()}) < sum(len(t.names()) for t in e.of):
        raise GraftError(asked, f"an adapter stands twice in the stack {e}", "name each adapter of a stack once")
    parts = [_expanded(model, t, asked) for t in e.of]
    if all(len(part) == 1 and part[0][0] == 1 for part in parts):
        return [(1.0, Stack(tuple(t for part in parts for _, t in part)))]
    for n in e.names():
        adapter = find(model, n)
        for part in adapter.parts:
            if not all(isinstance(delta, WeightDelta) and delta.additive for delta in part.deltas.values()):
                found = f"a sum inside of a stack, where {part.method.name} of {n!r} does more than add to the weights"
                raise GraftError(asked, found, "compose the sum first, then the stack with what it gives")
    return [pair for part in parts for pair in part]


def _one(model: nn.Module, e: Expr) -> Adapter:
    """What an expression of adapters, stacks and `drop` does, as one adapter that shares their deltas; not attached."""
    if isinstance(e, A):
        return find(model, e.name)
    inner = [_one(model, t) for t in e.inner()]
    parts = [part for adapter in inner for part in adapter.parts]
    if isinstance(e, Drop):
        gone = {site.key for site in in_layers(list(parts[0].anatomy.sites), e.layers)}
        parts = [_without(part, gone) for part in parts]
    one = Adapter(str(e), parts)
    one.metadata = inner[-1].metadata
    one.labels = next((adapter.labels for adapter in reversed(inner) if adapter.labels), None)
    return one


def _without(part: Part, gone: set[str]) -> Part:
    """A method's deltas at all sites but these."""
    rest = Part(part.method, [site for site in part.sites if site.key not in gone], part.anatomy)
    rest.deltas = {site.key: part.deltas[site.key] for site in rest.sites}
    return rest
