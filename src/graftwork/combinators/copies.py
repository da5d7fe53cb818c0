"""A delta of which there are several copies: one of them runs in a training pass, their mean in all others (see `adamix`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.passes import Runtime
from graftwork.core.swap import swapped

from .substituted import Substituted


class Copies(Substituted):
    """Mixin of the two kinds. delta: the first copy, with what all share; others: the further copies of its tensors `copied`.

    drawn: the copy of the "down" side and that of the "up" side in the last pass, None before the first one that trains.
    """

    delta: Delta
    others: nn.ModuleList
    drawn: dict[str, int] | None
    runtime: Runtime
    training: bool

    def setup(self, delta: Delta, copies: int, share: str) -> None:
        self.delta, self.copies, self.drawn = delta, copies, None
        self.like(delta)
        self.lasting = isinstance(delta, WeightDelta) and delta.lasting
        own = dict(delta.named_parameters())
        self.copied = [name for name in own if copies > 1 and side_of(name) != share]
        self.others = nn.ModuleList(
            nn.ParameterList(nn.Parameter(own[name].detach().clone()) for _ in range(copies - 1))
            for name in self.copied
        )

    def draw(self) -> None:
        """Choose a copy for each side."""
        down, up = torch.randint(self.copies, (2,), device="cpu").tolist()
        self.drawn = {"down": down, "up": up}

    def every(self) -> dict[str, list[Tensor]]:
        """The copies of each tensor that has several."""
        own = dict(self.delta.named_parameters())  # not get_parameter: other tensors may stand in their place
        return {name: [own[name], *rest] for name, rest in zip(self.copied, self.others, strict=True)}  # type: ignore[misc]

    def tensors(self) -> dict[str, Tensor]:
        if self.training and self.drawn is not None and self.runtime.open:  # merging is outside of a pass
            if not torch.compiler.is_compiling():
                self.draw()  # here, and not when the pass begins: checkpointing gives a block that runs again its own generator's state
            return {name: copies[self.drawn[side_of(name)]] for name, copies in self.every().items()}
        return {name: torch.stack(copies).mean(0) for name, copies in self.every().items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside of this block the delta inside holds the means."""
        means = {name: torch.stack(copies).detach().mean(0) for name, copies in self.every().items()}
        homes = [name.rpartition(".") for name in means]
        slots = [(self.delta.get_submodule(path)._parameters, leaf) for path, _, leaf in homes]
        with swapped(slots, list(means.values())):
            yield


def side_of(name: str) -> str:
    """Whether a tensor belongs to the factor at the output, "up", or to what stands before it, "down"."""
    return "up" if any(word.rstrip("0123456789") == "up" for word in re.split(r"[._]", name)) else "down"


class CopiesDelta(Copies, Delta):  # type: ignore[misc]
    """Copies of an activation delta."""


class CopiesWeight(Copies, WeightDelta):  # type: ignore[misc]
    """Copies of a weight delta."""
