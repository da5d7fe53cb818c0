"""Whether a method with a schedule is stepped."""

from __future__ import annotations

import warnings

from torch import Tensor


class Clock:
    """Notices that a method with a schedule is trained and never stepped, and warns once."""

    def __init__(self) -> None:
        self.watched: Tensor | None = None
        self.version, self.missed, self.warned = 0, 0, False

    def watch(self, parameter: Tensor | None) -> None:
        """A parameter of an active method that needs `gw.step`, or None."""
        self.watched, self.missed = parameter, 0
        self.version = 0 if parameter is None else parameter._version

    def tick(self) -> None:
        """A training pass begins: has the optimiser moved the parameter without `gw.step`?"""
        if self.watched is None or self.watched._version == self.version:
            return
        self.version, self.missed = self.watched._version, self.missed + 1
        if self.missed > 1 and not self.warned:
            self.warned = True
            warnings.warn(
                "a method with a schedule is trained without gw.step: call gw.step(model, progress) after each optimiser step",
                stacklevel=2,
            )

    def stepped(self) -> None:
        """`gw.step` was called."""
        self.watch(self.watched)
