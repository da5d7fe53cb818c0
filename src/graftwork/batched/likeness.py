"""When two deltas compute the same function of other tensors, and how one of them runs with the tensors of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.method import Method
from ..core.passes import Runtime
from ..core.site import Site
from ..core.swap import Slot
from ..core.weight import Weight

_OF_A_PLACE = frozenset({"runtime", "key", "view"})  # what belongs to the site and the pass, not to the function
_OF_NN = frozenset(nn.Module().__dict__)


def like(delta: nn.Module) -> tuple[Hashable, list[Slot]]:
    """What a delta is but for the values of its tensors, and the slots of these.

    Two deltas with an equal first are the same function: one of them, with the tensors of the other, is the other. What is not
    understood counts as its identity, so that a delta is like itself only.
    """
    slots: list[Slot] = []
    return _module(delta, slots, {}), slots


def _module(m: nn.Module, slots: list[Slot], seen: dict[int, int]) -> Hashable:
    if id(m) in seen:
        return "again", seen[id(m)]
    seen[id(m)] = len(seen)
    tensors = []
    for home in (m._parameters, m._buffers):
        for name, t in home.items():
            tensors.append((name, None if t is None else (tuple(t.shape), t.dtype)))
            if t is not None:
                slots.append((home, name))
    own = {k: v for k, v in m.__dict__.items() if k not in _OF_NN and k not in _OF_A_PLACE}
    inner = [(name, child) for name, child in m._modules.items() if child is not None]
    return type(m), tuple(tensors), _value(own, slots, seen), _value(dict(inner), slots, seen)


def _value(v: Any, slots: list[Slot], seen: dict[int, int]) -> Hashable:
    if v is None or isinstance(v, str | int | float | bool | type | torch.dtype | torch.Size):
        return type(v), v
    if isinstance(v, nn.Module):
        return _module(v, slots, seen)
    if isinstance(v, Method):
        names = (f.name for f in dataclasses.fields(v) if f.name not in ("at", "layers"))
        return type(v), _value({name: getattr(v, name) for name in names}, slots, seen)
    if isinstance(v, Mapping):
        return type(v), tuple((k, _value(x, slots, seen)) for k, x in v.items())
    if isinstance(v, tuple | list):
        return type(v), tuple(_value(x, slots, seen) for x in v)
    if isinstance(v, Site):
        return Site, v.key
    if isinstance(v, Weight):
        return Weight, v.name, v.shape, v.stored, v.rows
    return type(v), id(v)


class SharedStateError(Exception):
    """A function that was to run on rows apart asked for what all rows share."""


class _Closed(dict[Any, Any]):
    """The state of a pass, out of reach."""

    def _refuse(self, *_: Any) -> Any:
        raise SharedStateError

    __getitem__ = __setitem__ = __contains__ = get = pop = setdefault = __iter__ = _refuse


MASK = ""  # the name of the padding mask beside those of the context


@contextmanager
def narrowed(
    runtime: Runtime, sides: Mapping[str, Any], closed: bool = False, state: dict[Any, Any] | None = None
) -> Iterator[None]:
    """Inside this block the pass shows the mask and the context of some rows only; closed: and no state;  state: and this one."""
    before = runtime.mask, runtime.context, runtime.state
    runtime.mask = sides.get(MASK)
    runtime.context = {name: value for name, value in sides.items() if name != MASK}
    if closed:
        runtime.state = _Closed()
    elif state is not None:
        runtime.state = state
    try:
        yield
    finally:
        runtime.mask, runtime.context, runtime.state = before
