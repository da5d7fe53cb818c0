"""Full: a whole module trained, stored as its values. Task heads, norms, or anything else that is small enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import positive, where, words
from graftwork.core.initial import kaiming_uniform, parameter, values, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site


@method("full")
@dataclass(frozen=True)
class Full(Method):
    """P' = V for every parameter P of the module, V initialised at P.  Identity at init; mergeable.

    outputs: number of rows of the last module's weight and bias (a head of its own size: fresh rows, kaiming-uniform,
        bias zero); None keeps the backbone's.
    only: names of the module's parameters ("bias"); empty takes all of them.
    lr: a head ("at='head'") starts at random, and is what some methods move most: five times the rate of others where none is given.
        What is pretrained and trained whole has a fortieth of it, 5e-5; norms alone half of it.
    Parameters: all of the module's.  The backbone's own values stay untouched, so several heads live on one backbone.
    When: the reference that every method is compared with, heads, norms, or single layers that are trained whole.
    """

    outputs: int | None = positive(None)
    only: tuple[str, ...] = words()
    at: str = where("head")

    mergeable = True
    replaces = True

    @property
    def lr(self) -> float:  # type: ignore[override]
        """Higher for a head, lower for what is pretrained."""
        return Method.lr * {"head": 5, "norm": 1 / 2}.get(self.at, 1 / 40)

    def build(self, site: Site, part: Part) -> Values | None:
        if site.rows is not None:
            raise GraftError(f"{self} at {site.key}", "a slice of a packed weight", "choose the whole weight (qkv)")
        owned = self.owned(site)
        if not owned:
            return None
        outputs = self.outputs if site is part.sites[-1] else None
        return Values(owned, outputs)

    def count(self, site: Site) -> int:
        return sum(p.numel() for p in self.owned(site).values())

    def owned(self, site: Site) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        own = site.module._parameters
        asked = {n: p for n, p in own.items() if p is not None and (not self.only or n in self.only)}
        return {n: site.weight.decoded(p) if n == site.param else p for n, p in asked.items()}


class Values(WeightDelta):
    """`values`: one parameter per parameter of the host, of the same name."""

    def __init__(self, owned: Mapping[str, Tensor], outputs: int | None) -> None:
        super().__init__()
        self.values = nn.ParameterDict()
        for name, p in owned.items():
            if outputs is None or outputs == p.shape[0]:
                self.values[name] = parameter(tuple(p.shape), values(p), p)
            else:
                shape = (outputs, *p.shape[1:])
                self.values[name] = parameter(shape, kaiming_uniform() if p.dim() > 1 else zeros, p)

    def names(self) -> tuple[str, ...]:
        return tuple(self.values.keys())

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        return self.values[name]

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take stored values; a head may have another number of rows than the backbone's."""
        for name in list(self.values):
            new, old = tensors.get(f"values.{name}"), self.values[name]
            if new is not None and new.shape != old.shape and new.shape[1:] == old.shape[1:]:
                self.values[name] = nn.Parameter(old.detach().new_empty(new.shape))
        super().restore(tensors)
