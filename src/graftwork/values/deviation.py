"""Which tensors of a delta its effect is proportional to, and what value of them means no effect.

One handler per kind of delta; a method of one's own joins with `@neutral.register`.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from ..core.delta import Delta
from ..core.errors import GraftError
from ..methods.activation.bottleneck import Residual
from ..methods.weight.bitfit import Shift
from ..methods.weight.full import Values
from ..methods.weight.ia3 import Rescale
from ..methods.weight.lora import LowRank


@singledispatch
def neutral(delta: Delta, asked: str) -> dict[str, Tensor]:
    """The values without effect, by tensor, float64: moving all of them to x0 + f (x - x0) makes the effect f times as large."""
    do = "average such adapters (gw.average), or combine their changes of weights (gw.combine)"
    raise GraftError(
        asked, f"{type(delta).__name__} at {delta.key}, whose effect is proportional to none of its tensors", do
    )


@neutral.register
def _(delta: LowRank, asked: str) -> dict[str, Tensor]:
    return _like(delta, ("up",), 0.0)


@neutral.register
def _(delta: Rescale, asked: str) -> dict[str, Tensor]:
    return _like(delta, ("scale",), 1.0)


@neutral.register
def _(delta: Shift, asked: str) -> dict[str, Tensor]:
    return _like(delta, tuple(delta.state_dict()), 0.0)


@neutral.register
def _(delta: Residual, asked: str) -> dict[str, Tensor]:
    last = ("norm_weight", "norm_bias") if delta.method.norm == "after" else ("up", "up_bias")
    return _like(delta, last, 0.0)


@neutral.register
def _(delta: Values, asked: str) -> dict[str, Tensor]:
    return {}  # a head: no effect of its own, it is averaged as it is


def _like(delta: Delta, names: tuple[str, ...], value: float) -> dict[str, Tensor]:
    own = delta.state_dict()
    return {n: torch.full(own[n].shape, value, dtype=torch.float64) for n in names if n in own}
