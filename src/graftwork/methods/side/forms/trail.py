"""What the blocks of a frozen stack leave behind for a network beside it, and where that network meets the stack again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.initial import Initial, kaiming_uniform, parameter, zeros
from graftwork.core.plan import channels_first, first_output, first_tensor, replace_output
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


def stack_of(part: Part, site: Site, asked: str) -> list[Site]:
    """The blocks around a block or top that a side network reads. GraftError where it cannot stand here."""
    if site.role not in ("block", "top") or not any(s.role == "top" for s in part.sites):
        raise GraftError(asked, "not a block, or no top to the blocks", "leave `at` as it is")
    blocks = [s for s in part.sites if s.role == "block" and s.tower == site.tower]
    widths = sorted({s.d for s in blocks})
    if len(widths) != 1 or channels_first(blocks[0].module):
        found = f"no blocks that all give tokens of one width: {widths or 'none'}"
        raise GraftError(asked, found, "choose a backbone of transformer blocks, all of them")
    return blocks


def causal(block: nn.Module) -> bool:
    """Whether the block says that a token sees only those before it: by a flag of its attention, or a mask [1, 1, n, n] it keeps."""
    flags = any(getattr(m, "is_causal", False) or getattr(m, "is_decoder", False) for m in block.modules())
    return flags or any(
        t.dim() == 4 and t.shape[:2] == (1, 1) and t.shape[2] == t.shape[3] > 1 for t in block.buffers()
    )


def visible(given: Mapping[Any, Any], seq: int) -> Tensor | None:
    """True where a query may look, [batch or 1, 1, seq, seq], by the mask among a block's arguments; None without such a mask."""
    for mask in given.values():
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1:] == (1, seq, seq):
            return mask if mask.dtype == torch.bool else mask > -1
    return None


class Line(nn.Module):
    """x W^T + b,  W [out, in]."""

    def __init__(self, d_in: int, d_out: int, like: Tensor, init: Initial | None = None) -> None:
        super().__init__()
        self.weight = parameter((d_out, d_in), init or kaiming_uniform(), like)
        self.bias = parameter((d_out,), zeros, like)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Step(Delta):
    """A block of the backbone, run without a graph and written down."""

    def __init__(self, site: Site, trail: str) -> None:
        super().__init__()
        self.trail = trail
        self.names = list(inspect.signature(site.module.forward).parameters)

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = base(*args, **kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        x = first_tensor(args, kwargs)
        name = next(key for key, value in given.items() if value is x)
        state = self.runtime.state
        inside = state.pop((self.trail, "inside"), None)
        state.setdefault(self.trail, []).append(Seen(self, name, x.detach(), first_output(out).detach(), given, inside))
        return out


class End(Delta):
    """Where a stack ends, at its last norm or else at its last block: `finish` makes the stack's output of what was seen.

    graph: the norm or block itself runs with one.
    """

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
