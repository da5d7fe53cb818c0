"""One adapter per row: a group is what some adapters do at one site of a batch, and how its tensors are kept.

Its tensors are stacked [adapters, ...] once, gathered [rows, ...] at the first forward,
and then one grouped product serves all rows: no loop over adapters. `rows` here are runs of neighbours with the same adapter, all
of one length, so that a batch sorted by adapter has few and large ones (see `Table`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.delta import Delta
from ..core.unreadable import unreadable

if TYPE_CHECKING:
    from .rows import Table

Base = Callable[..., Tensor]


class Group:
    """What some adapters do at one site. `places` says for each row which of `deltas` is its own; len(deltas) is none of them.

    key: the site's;  source: as of a delta;  whole: no row is without;  names: of the host's parameters that are adapted.
    """

    names: tuple[str, ...] = ()
    source = "input"

    def __init__(self, table: Table, key: str, members: dict[int, Any]) -> None:
        self.table, self.key, self.deltas = table, key, list(members.values())
        number = {chain: i for i, chain in enumerate(members)}
        self.places = [
            len(self.deltas) if chain is None else number.get(chain, len(self.deltas)) for chain in table.index
        ]
        self.covered = tuple(row for row, place in enumerate(self.places) if place < len(self.deltas))
        self.whole = len(self.covered) == len(self.places)
        self.gathered: list[Tensor | None] | None = None
        self.epoch = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "gathered": None}

    @property
    def identity(self) -> tuple[Any, ...]:
        """What its stack is a stack of."""
        each = [tuple(map(id, d)) if isinstance(d, list) else id(d) for d in self.deltas]
        return type(self).__name__, self.key, self.names, self.whole, *each

    def stack(self) -> list[Tensor | None]:
        """The tensors of all deltas, [deltas (+ 1 for the rows without), ...]."""
        raise NotImplementedError

    def gather(self, stack: list[Tensor | None]) -> list[Tensor | None]:
        """[rows, ...] from the stack."""
        return [None if t is None else self.of_rows(t) for t in stack]

    def of_rows(self, t: Tensor) -> Tensor:
        """t [deltas, ...] as [rows, ...]; t itself where every row has its own."""
        if self.places == list(range(t.shape[0])):
            return t
        return t.index_select(0, self.table.at(self.places, t.device))

    def tensors(self) -> list[Tensor | None]:
        """The tensors of each row: built anew where gradients are wanted, otherwise once."""
        if self.table.learning and torch.is_grad_enabled():
            return self.gather(self.stack())
        if self.gathered is None or self.epoch != self.table.epoch:
            with torch.no_grad():
                self.gathered = self.gather(self.table.stacked(self, self.stack))
            self.epoch = self.table.epoch
        return self.gathered

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        """What somebody sees who reads the weight around the module: its shape and dtype, no numbers."""
        return unreadable(name, stored, self.key, "row", "activate one adapter at a time, with gw.using, for its rows")


class Step(Group):
    """A group of weight deltas on a module that is called: step(call, base, x) -> y, call being the step before, base the module itself."""

    def __init__(self, table: Table, key: str, members: dict[int, Any], names: tuple[str, ...]) -> None:
        super().__init__(table, key, members)
        self.names = names
        view: Any = self.deltas[0].view if isinstance(self.deltas[0], Delta) else self.deltas[0][0].view
        self.span = view.rows

    def __call__(self, call: Base, base: Base, x: Tensor, *rest: Any) -> Tensor:
        x = self.table.wide(x, self.key)
        y = call(x, *rest)
        if self.span is None:
            return self.edit(x, y, base)
        part = y[..., self.span[0] : self.span[1]]
        new = self.edit(x, part, base)
        return y if new is part else torch.cat([y[..., : self.span[0]], new, y[..., self.span[1] :]], -1)

    def edit(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """y of all rows, which may be written into, with this group's rows edited."""
        raise NotImplementedError
