"""What the sites that read one input have in common in a training pass: q, k and v; gate and up.

They read the very same tensor one after another, which is how they find each other: no plan, no names. The input is made
again once for all of them, products with a frozen A that they share (VeRA) are computed once, and dropout on the input
is one draw, as in the authors' code of LoRA, where q, k and v are one module.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .replay import recipe, version


class Input:
    """One input x [..., in] of one or more sites, from the forward pass to the last backward pass that asks for it."""

    def __init__(self, x: Tensor) -> None:
        self._version = version(x)
        self._make = recipe(x)
        self._masks: dict[float, list[tuple[Tensor, float]]] = {}
        self._readers: list[Any] = []
        self._waiting = 0
        self._values: dict[Any, Tensor] = {}

    def fits(self, x: Tensor, reader: Any) -> bool:
        """Whether a reader that now sees x sees what the others saw. A second use by one reader is another pass."""
        return self._version == version(x) and all(reader is not other for other in self._readers)

    def join(self, reader: Any) -> None:
        """One more reader: one more backward pass to come."""
        self._readers.append(reader)
        self._waiting += 1

    def keep(self, x: Tensor) -> Tensor | None:
        """What a reader has to save for its backward pass: x, or nothing."""
        return x if self._make is None else None

    def again(self, kept: Tensor | None) -> Tensor:
        """x in the backward pass."""
        if kept is not None:
            return kept
        assert self._make is not None
        return self.once("x", self._make)

    def once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """make(), computed once for all readers in one direction; each time where that is itself differentiated."""
        if torch.is_grad_enabled():
            return make()
        if key not in self._values:
            self._values[key] = make()
        return self._values[key]

    def done(self) -> None:
        """A reader's backward pass is over; after the last one nothing stays."""
        self._waiting -= 1
        if self._waiting <= 0:
            self.forget()
            self._waiting = len(self._readers)  # the graph may be retained

    def forget(self) -> None:
        """Free what was computed for more readers than came, or for all that did."""
        self._values.clear()

    def masks(self, dropout: float, count: int, draw: Callable[[], tuple[Tensor, float]]) -> list[tuple[Tensor, float]]:
        """What each of several draws of the dropout keeps of x, and the probability of it: the same ones for all readers."""
        drawn = self._masks.setdefault(dropout, [])
        drawn += [draw() for _ in range(count - len(drawn))]
        return drawn[:count]


class _Last(threading.local):
    """The input that was read last in this thread."""

    def __init__(self) -> None:
        self.input: Input | None = None
        self.x: Callable[[], Tensor | None] = lambda: None


_last = _Last()


def input_of(x: Tensor, reader: object) -> Input:
    """The record of x: that of the reader before, where it read the same tensor."""
    found, last = _last.input, _last
    if found is None or last.x() is not x or not found.fits(x, reader):
        if found is not None:
            found.forget()
        found = last.input = Input(x)
        last.x = weakref.ref(x, partial(_passed, last.__dict__))
    found.join(reader)
    return found


def _passed(last: dict[str, Any], x: object) -> None:
    """The tensor is gone: nobody will read it again, and the graph that its record points into may go."""
    if last["x"] is x:
        last["input"].forget()
        last["input"] = None
