"""What the blocks of a frozen stack leave behind for a network beside it, and where that network meets the stack again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.initial import Initial, kaiming_uniform, parameter, zeros
from graftwork.core.plan import first_output, first_tensor, replace_output
from graftwork.core.site import Site


@dataclass(frozen=True)
class Seen:
    """One block's pass: x its input and h its output [batch, seq, d], both without a graph.

    step: the delta beside it;  name: that of x among the block's arguments;  given: those arguments;  inside: what a delta
    in the block has put into the pass's state under (trail, "inside").
    """

    step: Any
    name: str
    x: Tensor
    h: Tensor
    given: dict[str, Any]
    inside: Any


def ending(part: Part, site: Site) -> bool:
    """Whether the stack of this site ends in the model's output, and not in another stack (the encoder of an encoder-decoder)."""
    return any(top.tower == site.tower and top.exit is not None for top in part.anatomy.of("top"))


def causal(block: nn.Module) -> bool:
    """Whether a token of this block sees only those before it."""
    return any(getattr(m, "is_causal", False) or getattr(m, "is_decoder", False) for m in block.modules())


class Line(nn.Module):
    """x W^T + b,  W [out, in]."""

    def __init__(self, d_in: int, d_out: int, like: Tensor, init: Initial | None = None) -> None:
        super().__init__()
        self.weight = parameter((d_out, d_in), init or kaiming_uniform(), like)
        self.bias = parameter((d_out,), zeros, like)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Step(Delta):
    """A block of the backbone, run without a graph and written down. graph: it runs with one, and the record alone has none."""

    graph: bool = False

    def __init__(self, site: Site, trail: str) -> None:
        super().__init__()
        self.trail = trail
        self.names = list(inspect.signature(site.module.forward).parameters)

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.graph and torch.is_grad_enabled()):
            out = base(*args, **kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        x = first_tensor(args, kwargs)
        name = next(key for key, value in given.items() if value is x)
        state = self.runtime.state
        inside = state.pop((self.trail, "inside"), None)
        state.setdefault(self.trail, []).append(Seen(self, name, x.detach(), first_output(out).detach(), given, inside))
        return out


class End(Delta):
    """Where a stack ends, at its last norm or else at its last block: `finish` makes the stack's output of what was seen."""

    graph: bool = False

    def __init__(self, trail: str) -> None:
        super().__init__()
        self.trail = trail

    def finish(self, y: Tensor, seen: list[Seen]) -> Tensor | None:
        """What stands for the stack's output y [batch, seq, d]; None: y itself."""
        raise NotImplementedError

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x: Any = first_tensor(args, kwargs)
        records = self.runtime.state.setdefault(self.trail, [])
        if not records and hasattr(x, "graft_records"):
            records.extend(x.graft_records)  # gradient checkpointing runs the last block again, outside of the pass
        before = tuple(records)
        with torch.set_grad_enabled(self.graph and torch.is_grad_enabled()):
            out = base(*args, **kwargs)
        if len(records) > len(before) and not torch.compiler.is_compiling():
            x.graft_records = before
        y = first_output(out)
        z = self.finish(y if self.graph else y.detach(), self.runtime.state.pop(self.trail))
        return out if z is None else z if isinstance(out, Tensor) else replace_output(out, z)
