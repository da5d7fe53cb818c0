"""What a mixing expression asks at one place: how much of each adapter's value is taken, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta
from .kept import Keeper


class Members:
    """The adapters that are mixed at one place.

    who: the number that each has among all that the mixer was made for;  deltas: what each does here, in order.
    """

    def __init__(self, who: Sequence[int], deltas: Sequence[Sequence[Delta]]) -> None:
        self.who, self.deltas = tuple(who), [list(chain) for chain in deltas]
        homes = (m for chain in self.deltas for d in chain for m in _homes(d))
        self._kept: Keeper[Any] = Keeper(homes)
        self._last: dict[str, Any] = {}

    def derived(self, name: str, make: Callable[[], Any]) -> Any:
        """make(), which depends on the members' tensors alone: made again when one has changed."""
        if not torch.compiler.is_compiling():
            self._last[name] = self._kept.get(name, make)
        elif name not in self._last:
            self._last[name] = make()
        return self._last[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": {}}


def _homes(delta: Delta) -> Sequence[nn.Module]:
    sources = getattr(delta, "sources", None)
    return [m for source in (sources() if sources else [delta]) for m in source.modules()]


class Mixer(Delta):
    """A delta that mixes others: with z_i what the i-th of them makes of the value y,

        y' = y + sum_i w_i (z_i - y),

    so that sum_i w_i z_i where the w_i add up to 1. Override `weights`, or `mix` where the z_i themselves have a say.

    before: w mixes the factors of low-rank updates, not what they give: y' = y + (sum_i w_i B_i) (sum_i w_i A_i) x.
    """

    before: bool = False

    def weights(self, x: Tensor, y: Tensor, members: Members) -> Tensor:
        """w [..., n], or what broadcasts to it, for x [..., d_in] that the members read and y [..., d]."""
        raise NotImplementedError

    def mix(self, x: Tensor, y: Tensor, values: Sequence[Tensor], members: Members) -> Tensor:
        """y' [..., d] from y [..., d] and the n values z_i [..., d]."""
        w = self.noted(self.weights(x, y, members), members)
        total = y
        for i, z in enumerate(values):
            total = total + w[..., i, None].to(y.dtype) * (z - y)
        return total

    def noted(self, w: Tensor, members: Members) -> Tensor:
        """w, shown to whoever watches how adapters are mixed (`mixing_weights`)."""
        if self.runtime.watching is not None:
            self.runtime.watching(self.key, members.who, w.detach())
        return w

    def check(self, members: Members) -> None:
        """GraftError where these members cannot be mixed."""
