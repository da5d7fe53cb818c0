"""The deltas of AdapterDrop: those inside, or, in a training pass whose draw leaves their layer out, nothing (see `adapter_drop`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.passes import Runtime
from graftwork.core.site import Site

from .substituted import Substituted

# what each function of a delta gives where there is none
NOTHING: dict[str, Callable[..., Any]] = {
    "forward": lambda x, y: y,
    "enter": lambda x: x,
    "amend": lambda x, base: x,
    "attend": lambda q, k, v, mask, attention: attention(q, k, v, mask),
    "around": lambda base, *args, **kwargs: base(*args, **kwargs),
    "weight": lambda w: w,
    "bias": lambda b: b,
    "linear": lambda x, base, host: base(x),
    "adapted": lambda name, stored: stored,
    "auxiliary_loss": lambda: None,
}


class Dropped(Substituted):
    """Mixin: every function of the delta inside, or of none. layer, depth: as of its site."""

    delta: Delta
    runtime: Runtime
    training: bool

    def setup(self, delta: Delta, site: Site) -> None:
        self.delta, self.layer, self.depth = delta, site.layer, site.depth
        self.like(delta)
        self.lasting = isinstance(delta, WeightDelta) and delta.lasting

    def join(self, runtime: Runtime) -> None:
        super().join(runtime)  # type: ignore[misc]
        runtime.draws = True

    def run(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """The function, unless this pass goes without it. Outside of a pass (merging) nothing is dropped."""
        lowest = self.training and self.layer is not None and self.runtime.open
        if lowest and self.layer < int(self.runtime.draw * self.depth):  # type: ignore[operator]
            return NOTHING[function](*args, **kwargs)
        return getattr(self.delta, function)(*args, **kwargs)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.delta.restore({name.removeprefix("delta."): t for name, t in tensors.items()})

    def overrides(self, function: str) -> bool:
        return function not in ("factors", "diagonal") and self.delta.overrides(function)


class DroppedDelta(Dropped, Delta):  # type: ignore[misc]
    """Of an activation delta."""

    def __init__(self, delta: Delta, site: Site) -> None:
        Delta.__init__(self)
        self.setup(delta, site)


class DroppedWeight(Dropped, WeightDelta):  # type: ignore[misc]
    """Of a weight delta."""

    def __init__(self, delta: WeightDelta, site: Site) -> None:
        WeightDelta.__init__(self)
        self.setup(delta, site)
