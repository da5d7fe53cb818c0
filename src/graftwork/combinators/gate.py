"""A gate, and the weight delta that has one (see `gated`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.delta import WeightDelta
from graftwork.core.initial import normal, parameter, uniform, zeros
from graftwork.core.passes import Runtime, token_mean
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.unreadable import CALLED, unreadable

from .change import change

if TYPE_CHECKING:
    from .gated import Gated


class Gate(nn.Module):
    """weight = w [1, d], bias = b [1]."""

    def __init__(self, method: Gated, d: int, like: Tensor) -> None:
        super().__init__()
        near = uniform(-(d**-0.5), d**-0.5)
        plain = method.init == "normal"
        self.weight = parameter((1, d), normal(method.init_std) if plain else near, like)
        self.bias = parameter((1,), zeros if plain else near, like)
        self.real = method.tokens == "real"

    def forward(self, x: Tensor, runtime: Runtime) -> Tensor:
        """g [batch, 1, ...] for x [batch, ..., d]."""
        flat = F.linear(
            x.reshape(-1, x.shape[-1]), self.weight, self.bias
        )  # on more axes, other bits when weights are frozen
        return token_mean(torch.sigmoid(flat).reshape(*x.shape[:-1], 1), runtime, self.real)


class GatedWeight(WeightDelta):
    """y + g (W' - W) x.  delta: the one inside;  gate: of x."""

    def __init__(self, delta: WeightDelta, gate: Gate, site: Site) -> None:
        super().__init__()
        self.delta, self.gate = delta, gate
        self.place(site.key, site.weight)

    def inner(self) -> list[WeightDelta]:
        return [self.delta]

    @property
    def additive(self) -> bool:  # type: ignore[override]
        return self.delta.additive

    def names(self) -> tuple[str, ...]:
        return self.delta.names()

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        return unreadable(name, stored, self.key, "example", CALLED)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take stored tensors; the delta inside takes its own, in whatever form they are."""
        self.delta.restore({name[6:]: t for name, t in tensors.items() if name.startswith("delta.")})
        taken = {f"delta.{name}": t for name, t in self.delta.state_dict().items()}
        super().restore({name: t for name, t in tensors.items() if not name.startswith("delta.")} | taken)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y, g = base(x), self.gate(x, self.runtime)
        return y + g * change(self.delta, x, y, base, host)

    def auxiliary_loss(self) -> Tensor | None:
        return self.delta.auxiliary_loss()

    def overrides(self, function: str) -> bool:
        return function == "linear"
