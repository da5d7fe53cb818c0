"""A delta that runs the delta inside it with other tensors in the place of its parameters: generated ones, or masked
ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.attention import Attention
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.method import Method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.swap import functional


def template(asked: Method, of: Method, site: Site, part: Part) -> Delta | None:
    """The delta of the method inside, whose parameters alone will be replaced. GraftError where it holds more than these."""
    scratch = Part(of, part.sites, part.anatomy)
    delta = of.build(site, scratch)
    if delta is None:
        return None
    if len(scratch.shared_modules) or list(delta.buffers()):
        found = f"{of.name} holds more than the parameters of each site"
        raise GraftError(f"{asked} at {site.key}", found, "put another method inside")
    if isinstance(delta, WeightDelta):
        delta.place(site.key, site.weight)
    return delta


class Substituted:
    """Mixin: every function of the delta inside, computed with `tensors()`. delta: the one inside, where it is always the same."""

    delta: Delta

    def like(self, delta: Delta) -> None:
        """Be to others what `delta` is; whether its weight lasts is for the combinator to say."""
        self.source, self.reading, self.itself = delta.source, delta.reading, delta.itself
        self.additive = isinstance(delta, WeightDelta) and delta.additive

    @property
    def inside(self) -> Delta:
        """The delta that does the work."""
        return self.delta

    def matrices(self) -> dict[str, nn.Parameter]:
        """The parameters of the delta inside that have more than one axis."""
        return {name: p for name, p in self.inside.named_parameters() if p.dim() > 1}

    def work(self) -> int:
        return max((d.work() for d in self.inner() if isinstance(d, WeightDelta)), default=0)

    def sources(self) -> Iterator[nn.Module]:
        yield self  # type: ignore[misc]  # a mixin of modules
        for delta in self.inner():
            if isinstance(delta, WeightDelta):
                yield from delta.sources()

    def tensors(self) -> dict[str, Tensor]:
        """What stands in the place of the inside's parameters in this pass."""
        raise NotImplementedError

    def inner(self) -> list[Delta]:
        return [self.inside]

    def run(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """inside.function(*args, **kwargs) with these tensors."""
        return functional(self.inside, self.tensors(), function, *args, **kwargs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run("forward", x, y)

    def enter(self, x: Tensor) -> Tensor:
        return self.run("enter", x)

    def amend(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return self.run("amend", x, base)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        return self.run("attend", q, k, v, mask, attention)

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.run("around", base, *args, **kwargs)

    def weight(self, w: Tensor) -> Tensor:
        return self.run("weight", w)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return self.run("bias", b)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        return self.run("linear", x, base, host)

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        return self.run("adapted", name, stored)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.run("factors")

    def names(self) -> tuple[str, ...]:
        assert isinstance(self.inside, WeightDelta)
        return self.inside.names()

    def auxiliary_loss(self) -> Tensor | None:
        return self.run("auxiliary_loss")

    def overrides(self, function: str) -> bool:
        return self.inside.overrides(function)
