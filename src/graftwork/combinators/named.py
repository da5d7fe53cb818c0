"""The deltas of a keyed method: several, of which the context names the one that acts (see `keyed`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.tasks import one_of

from .substituted import Substituted


class Named(Substituted):
    """Mixin of the two kinds. of: one delta for each of `named`;  by: the context's word."""

    def setup(self, deltas: Sequence[Delta], named: Sequence[str], by: str) -> None:
        self.of, self.named, self.by = nn.ModuleList(deltas), tuple(named), by
        self.like(deltas[0])

    def inner(self) -> list[Delta]:
        return list(self.of)  # type: ignore[arg-type]

    @property
    def inside(self) -> Delta:
        return self.inner()[one_of(self.context(self.by), self.named, self.key, self.by)]  # type: ignore[attr-defined]

    def run(self, function: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inside, function)(*args, **kwargs)

    def names(self) -> tuple[str, ...]:
        first = self.inner()[0]
        assert isinstance(first, WeightDelta)
        return first.names()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take stored tensors; each delta its own, in whatever form they are."""
        own = [
            {name.removeprefix(f"of.{i}."): t for name, t in tensors.items() if name.startswith(f"of.{i}.")}
            for i in range(len(self.named))
        ]
        if sum(map(len, own)) < len(tensors):
            super().restore(tensors)  # type: ignore[misc]  # names those that are nobody's
        for delta, given in zip(self.inner(), own, strict=True):
            delta.restore(given)

    def overrides(self, function: str) -> bool:
        # the one that acts is known in a pass only, and all are alike
        return function not in ("factors", "diagonal") and self.inner()[0].overrides(function)


class KeyedDelta(Named, Delta):  # type: ignore[misc]
    """Of activation deltas."""

    def __init__(self, deltas: Sequence[Delta], named: Sequence[str], by: str) -> None:
        Delta.__init__(self)
        self.setup(deltas, named, by)


class KeyedWeight(Named, WeightDelta):  # type: ignore[misc]
    """Of weight deltas."""

    def __init__(self, deltas: Sequence[Delta], named: Sequence[str], by: str) -> None:
        WeightDelta.__init__(self)
        self.setup(deltas, named, by)
