"""Looking at how adapters are mixed: the mean weight of each, place by place, over as many passes as are run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from ..core.errors import GraftError
from ..expressions.algebra import Expr, as_expr, drop
from ..expressions.mixing import Fuse, Route, bare, made_for, parts_of, resolved, router
from .graft import active, adapters
from .root import body_of, root_of


class Weights(dict[str, dict[str, float]]):
    """{site key: {member: mean weight}}, filled by the passes inside of `mixing_weights`.

    members: the texts of what is mixed, in order.
    """

    def __init__(self, members: tuple[str, ...]) -> None:
        super().__init__()
        self.members = members
        self._sums: dict[str, tuple[dict[int, float], int]] = {}

    def take(self, key: str, who: tuple[int, ...], w: Tensor, mask: Tensor | None) -> None:
        """The weights w [..., n] of one call; tokens that a mask [batch, seq] hides do not count."""
        w = w.float().reshape(-1, w.shape[-1]) if mask is None or w.shape[:-1] != mask.shape else w.float()[mask.bool()]
        sums, count = self._sums.get(key, ({}, 0))
        for i, value in zip(who, w.sum(0).tolist(), strict=True):
            sums[i] = sums.get(i, 0.0) + value
        self._sums[key] = sums, count + len(w)
        self[key] = {self.members[i]: value / (count + len(w)) for i, value in sorted(sums.items())}


@contextmanager
def mixing_weights(model: nn.Module) -> Iterator[Weights]:
    """Inside this block, the weights that the active mixture gives to its members are averaged over all tokens, for each place.

        with gw.mixing_weights(model) as w:
            for batch in batches:
                model(**batch)
        w["encoder.layer.0:block"]   # {"a": 0.7, "b": 0.3}
    Raises GraftError where what is active is not one mixture.
    """
    root = root_of(model)
    seen = Weights(_members(_mixture(model), model))

    def watch(key: str, who: tuple[int, ...], w: Tensor) -> None:
        seen.take(key, who, w, root.runtime.mask)

    before, root.runtime.watching = root.runtime.watching, watch
    try:
        yield seen
    finally:
        root.runtime.watching = before


def pruned(model: nn.Module, expression: Expr | str, weights: Weights, keep: int) -> Expr:
    """A mixture whose every layer keeps the `keep` members of the largest mean weight; the softmax is over these.

    AdapterDrop (Rücklé et al. 2021), section 5: AdapterFusion with two or three of eight adapters a layer, not trained again.
    expression: fuse(...) or route(...), or the name of a fusion;  weights: of `mixing_weights`, from a few batches.
    Returns the expression with drop(member, layers="...") in it. Raises GraftError where keep is less than 1.
    """
    e = resolved(as_expr(expression), adapters(model))
    if not isinstance(e, Fuse | Route):
        raise GraftError(f"prune {e}", "not a mixture", "give fuse(...), route(...) or the name of a fusion")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise GraftError(f"prune {e}, keep={keep!r}", "not a number of adapters", "keep at least 1")
    known = _members(e, model)
    lost = [m for m in known if all(m not in of for of in weights.values())]
    if lost or not weights:
        raise GraftError(
            f"prune {e}", f"no weights of {lost[0] if lost else 'it'}", "run some batches in gw.mixing_weights"
        )
    layers: dict[int, dict[str, float]] = {}
    for key, of in weights.items():
        layer = body_of(model).sites[key].layer
        if layer is not None:
            sums = layers.setdefault(layer, dict.fromkeys(known, 0.0))
            for member, w in of.items():
                sums[member] += w
    gone: dict[str, list[int]] = {member: [] for member in known}
    for layer, sums in sorted(layers.items()):
        for member in sorted(known, key=lambda m: -sums[m])[keep:]:
            gone[member].append(layer)
    left = [drop(t, ",".join(map(str, gone[m]))) if gone[m := str(bare(t))] else t for t in e.of]
    return replace(e, of=tuple(left))


def _members(e: Fuse | Route, model: nn.Module) -> tuple[str, ...]:
    """What its members are called, by their numbers."""
    method, part = router(e, adapters(model))
    return tuple(map(str, e.of if part is None else made_for(method)))


def _mixture(model: nn.Module) -> Fuse | Route:
    """The one mixture that is active."""
    text = active(model)
    e = None if text is None else resolved(as_expr(text), adapters(model))
    found = [] if e is None else [t for t in parts_of(e) if isinstance(t, Fuse | Route)]
    if len(found) != 1:
        what = f"{len(found)} mixtures in {text}" if text else "nothing is active"
        raise GraftError("the weights of a mixture", what, "activate one fuse(...) or route(...)")
    return found[0]
