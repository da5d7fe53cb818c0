"""One adapter per row, for any delta: like ones run as one under `torch.func.vmap`, all others each on its own rows.

Nothing here knows a method. A delta under vmap sees one row, as a batch [k, ...] (k = 1 but for a run of rows with the same adapter),
with the mask and the context of that row; products with its parameters become batched products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.attention import Attention, chain
from ..core.delta import Delta
from ..core.plan import Host
from ..core.swap import Slot, swapped
from .group import Base, Group, Step
from .likeness import SharedStateError, narrowed

if TYPE_CHECKING:
    from .rows import Table

OF_VMAP = (
    "vmap",
    "atching rule",
    "FuncTorchBatched",
)  # in the messages of errors that are about vectorising, and in no others


class Like(Group):
    """Deltas that are one function of different tensors. slots: where these hang, in the same order for each delta."""

    def setup(self, slots: Sequence[list[Slot]], apart: bool) -> None:
        """apart: they cannot run as one."""
        self.slots, self.apart = slots, apart or len(self.deltas) == 1
        self.held: list[Tensor | None] = []  # tensors that are the same for all

    def stack(self) -> list[Tensor | None]:
        columns = [[home[name] for home, name in column] for column in zip(*self.slots, strict=True)]
        return [torch.stack(c) if _differ(c) else None for c in columns]

    def of_rows(self, t: Tensor) -> Tensor:
        places = [self.places[row] for row in self.covered]
        return t if places == list(range(t.shape[0])) else t.index_select(0, self.table.at(places, t.device))

    def run(self, function: str, *ts: Tensor, **fixed: Any) -> Tensor:
        """delta.function of [covered rows, k, ...] tensors, each row through its own delta."""
        if not self.apart:
            try:
                return self._together(function, ts, fixed | {"base": None})
            except (
                SharedStateError,
                RuntimeError,
            ) as error:  # a branch on values, state of the pass: it does not vectorise
                if not (isinstance(error, SharedStateError) or any(word in str(error) for word in OF_VMAP)):
                    raise
                self.apart = True
        return self._each(function, ts, fixed)

    def _together(self, function: str, ts: tuple[Tensor, ...], fixed: dict[str, Any]) -> Tensor:
        delta, runtime = self.deltas[0], self.table.runtime
        side, shared = self.table.sides(self.covered)
        used = [(slot, t) for slot, t in zip(self.slots[0], self.tensors(), strict=True) if t is not None]
        slots = [slot for slot, _ in used]

        def one(given: tuple[Tensor, ...], x: tuple[Tensor, ...], side: dict[str, Any]) -> Tensor:
            with swapped(slots, given), narrowed(runtime, shared | side, closed=True):
                return call(delta, function, x, fixed)

        return torch.func.vmap(one, randomness="error")(tuple(t for _, t in used), ts, side)  # type: ignore[no-any-return]

    def _each(self, function: str, ts: tuple[Tensor, ...], fixed: dict[str, Any]) -> Tensor:
        outs, order = [], []
        for i, delta in enumerate(self.deltas):
            at = [n for n, row in enumerate(self.covered) if self.places[row] == i]
            side, shared = self.table.sides([self.covered[n] for n in at])
            xs = [t[self.table.at(at, t.device)] for t in ts]
            own = state_of(self.table, [self.covered[n] for n in at])
            with narrowed(self.table.runtime, shared | {name: t.flatten(0, 1) for name, t in side.items()}, state=own):
                y = call(delta, function, tuple(x.flatten(0, 1) for x in xs), fixed)
            outs.append(y.unflatten(0, xs[0].shape[:2]))
            order += at
        return torch.cat(outs)[self.table.at(order, ts[0].device).argsort()]

    def split(self, t: Tensor) -> Tensor:
        """[covered rows, k, ...] of a tensor of the whole batch."""
        t = t.reshape(self.table.rows, -1, *t.shape[1:])
        return t if self.whole else t.index_select(0, self.table.at(self.covered, t.device))

    def joined(self, y: Tensor, new: Tensor) -> Tensor:
        """y of the whole batch with the covered rows replaced."""
        if self.whole:
            return new.reshape(y.shape)
        rows = self.table.at(self.covered, y.device)
        return y.reshape(self.table.rows, -1, *y.shape[1:]).index_copy(0, rows, new.to(y.dtype)).reshape(y.shape)


def _differ(column: Sequence[Tensor]) -> bool:
    """Whether each delta needs its own: a frozen tensor that all have (a random projection from one seed) is there once.

    One on the meta device (the form of what is generated) has no values.
    """
    first = column[0]
    return not first.is_meta and any(t.requires_grad or not torch.equal(t, first) for t in column)


def state_of(table: Table, rows: Sequence[int]) -> dict[Any, Any]:
    """What the deltas of these rows hand to each other in a pass: one delta may serve two expressions, each with rows of its own."""
    return table.runtime.state.setdefault(("rows", *rows), {})  # type: ignore[no-any-return]


def call(delta: Delta, function: str, x: tuple[Tensor, ...], fixed: dict[str, Any]) -> Tensor:
    """One delta on some rows. Its base is known for the input that it was given; under vmap there is no other."""
    if function not in ("linear", "amend"):
        return getattr(delta, function)(*x)  # type: ignore[no-any-return]
    given, y = x

    def base(other: Tensor) -> Tensor:
        if other is not given and fixed["base"] is None:
            raise SharedStateError
        return y if other is given else fixed["base"](other)

    if function == "amend":
        return delta.amend(given, base)
    return delta.linear(given, base, fixed["host"])  # type: ignore[operator, no-any-return]


class Linears(Like, Step):
    """Fast paths `linear` of like deltas."""

    def edit(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        view = self.deltas[0].view
        a, b = view.rows or (0, None)
        xs, ys = self.split(x), self.split(y)
        if self.whole and not self.proven:
            ys = ys.clone()  # a delta may write into it, and then turn out not to vectorise
        new = self.run(
            "linear", xs, ys, base=lambda other: base(other)[..., a:b], host=Host(self.host, view, first=False)
        )
        self.proven = True
        return self.joined(y, new)

    host: Any
    proven = False


class Forwards(Like):
    """Edits of the output, `forward(x, y)`, and of an input, `enter(x)` and `amend(x, base)`, where there are such."""

    def overrides(self, function: str) -> bool:
        return function in ("forward", "enter", "amend") and self.deltas[0].overrides(function)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The output of the whole batch, each row edited by its own delta."""
        x, y = self.table.wide(x, self.key), self.table.wide(y, self.key)
        return self.joined(y, self.run("forward", self.split(x), self.split(y)))

    def enter(self, x: Tensor) -> Tensor:
        """The input of the whole batch, likewise."""
        self.apart = True  # what is read here is used at the output: state of the pass
        x = self.table.wide(x, self.key)
        return self.joined(x, self.run("enter", self.split(x)))

    def amend(self, x: Tensor, base: Base) -> Tensor:
        """The input of the whole batch, where an edit asks for the module's output."""
        x = self.table.wide(x, self.key)
        return self.joined(x, self.run("amend", self.split(x), self.split(base(x)), base=base))


class Attends(Group):
    """The attention of each adapter's rows, one adapter after the other; rows without have the backbone's."""

    def overrides(self, function: str) -> bool:
        return function == "attend"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        """out [batch, heads, queries, d_head]."""
        if q.shape[0] != self.table.batch:  # an attention call has the batch, or windows of it, in front
            self.table.check(q, self.key)
        batch, size = q.shape[0], q.shape[0] // self.table.rows
        outs, at = [], []
        for i in range(len(self.deltas) + (not self.whole)):
            runs = [row for row, place in enumerate(self.places) if place == i]
            rows = self.table.at([r * size + n for r in runs for n in range(size)], q.device)
            seen = mask[rows] if mask is not None and mask.shape[0] == batch > 1 else mask
            side, shared = self.table.sides(runs)
            deltas = self.deltas[i] if i < len(self.deltas) else ()
            own = state_of(self.table, runs)
            with narrowed(self.table.runtime, shared | {name: t.flatten(0, 1) for name, t in side.items()}, state=own):
                outs.append(chain(deltas, q[rows], k[rows], v[rows], seen, attention.on(rows)))
            at.append(rows)
        return torch.cat(outs)[torch.cat(at).argsort()]
