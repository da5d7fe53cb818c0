"""One adapter per row: the grouped products of weight deltas, by the form of the update (see `group`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.delta import WeightDelta
from ..core.errors import GraftError
from ..core.swap import swapped
from ..expressions.mixed import through
from .group import Base, Step
from .likeness import narrowed

if TYPE_CHECKING:
    from .rows import Table


class LowRanks(Step):
    """y += (x A^T) B^T with each row's own A and B: W' = W + B A. Smaller ranks are filled up with zeros, rows without have zeros.

    The stack is A [deltas, r, in] and B^T [deltas, r, out], r the largest rank.
    """

    def stack(self) -> list[Tensor | None]:
        pairs = [delta.factors() for delta in self.deltas]
        r = max(down.shape[0] for down, _ in pairs)
        downs = [F.pad(down, (0, 0, 0, r - down.shape[0])) for down, _ in pairs]
        ups = [F.pad(up.mT, (0, 0, 0, r - up.shape[1])) for _, up in pairs]
        empty = [] if self.whole else [0]
        return [torch.stack([*ts, *(torch.zeros_like(ts[0]) for _ in empty)]) for ts in (downs, ups)]

    def edit(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        down, up = self.tensors()
        assert down is not None and up is not None
        thin = torch.bmm(x.reshape(self.table.rows, -1, x.shape[-1]), down.mT)  # [rows, n, r]
        y.view(self.table.rows, -1, y.shape[-1]).baddbmm_(thin.to(y.dtype), up.to(y.dtype))
        return y


class Lookups(LowRanks):
    """The same on a host that looks its input up: y += B A[:, id]. The As stand one after the other in one table."""

    def __init__(
        self, table: Table, key: str, members: dict[int, Any], names: tuple[str, ...], host: nn.Module
    ) -> None:
        super().__init__(table, key, members, names)
        self.host = host

    def gather(self, stack: list[Tensor | None]) -> list[Tensor | None]:
        down, up = stack
        assert down is not None and up is not None
        vocabulary = down.shape[2]
        first = self.table.at(self.places, down.device)[:, None] * vocabulary
        return [down.mT.reshape(-1, down.shape[1]), self.of_rows(up), first]

    def edit(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        down, up, first = self.tensors()
        assert up is not None and first is not None
        with swapped([(self.host._parameters, "weight")], [down]):  # type: ignore[list-item]
            thin = base(x.reshape(self.table.rows, -1) + first)
        y.view(self.table.rows, -1, y.shape[-1]).baddbmm_(thin.to(y.dtype), up.to(y.dtype))
        return y


class Diagonals(Step):
    """y' = after * base(before * x) + shift, by channels, with each row's own vectors; rows without have ones and zeros."""

    def __init__(
        self, table: Table, key: str, members: dict[int, Any], names: tuple[str, ...], channels_first: bool
    ) -> None:
        super().__init__(table, key, members, names)
        self.channels_first = channels_first
        self.enters = any(delta.diagonal()[0] is not None for delta in self.deltas)

    def stack(self) -> list[Tensor | None]:
        return [
            self._stack(vectors, n) for n, vectors in enumerate(zip(*(d.diagonal() for d in self.deltas), strict=True))
        ]

    def _stack(self, vectors: Sequence[Tensor | None], n: int) -> Tensor | None:
        known = [v for v in vectors if v is not None]
        if not known:
            return None
        neutral = torch.zeros_like(known[0]) if n == 2 else torch.ones_like(known[0])
        return torch.stack([neutral if v is None else v for v in (*vectors, *([] if self.whole else [None]))])

    def __call__(self, call: Base, base: Base, x: Tensor, *rest: Any) -> Tensor:
        if self.enters:
            before = self.tensors()[0]
            assert before is not None
            x = self.table.wide(x, self.key)
            x = (x.reshape(self.table.rows, -1, x.shape[-1]) * before.to(x.dtype)[:, None]).view(x.shape)
        return super().__call__(call, base, x, *rest)

    def edit(self, x: Tensor, y: Tensor, base: Base) -> Tensor:
        _, after, shift = self.tensors()
        whole = y
        if self.channels_first and y.dim() > 2:
            y = y.unflatten(0, (self.table.rows, -1))  # [rows, k, channels, *space]
            after, shift = (None if v is None else v[:, None, :, *[None] * (y.dim() - 3)] for v in (after, shift))
        else:
            y = y.view(self.table.rows, -1, y.shape[-1])
            after, shift = (None if v is None else v[:, None] for v in (after, shift))
        if torch.is_grad_enabled() and after is not None:  # y is not kept twice, but for a gradient of `after`
            y = y * after.to(y.dtype)
            y = y if shift is None else y + shift.to(y.dtype)
            return y.view(whole.shape)
        if after is not None:
            y.mul_(after.to(y.dtype))
        if shift is not None:
            y.add_(shift.to(y.dtype))
        return whole


class Denses(Step):
    """Whole weights, one per adapter: norms, heads, convolutions, and everything that has no faster form.

    together: the module runs once, under vmap, with each row's own parameters [rows, ...]; otherwise once for each adapter, on its rows.
    """

    def __init__(
        self,
        table: Table,
        key: str,
        members: dict[int, list[WeightDelta]],
        names: tuple[str, ...],
        host: nn.Module,
        together: bool,
    ) -> None:
        super().__init__(table, key, members, names)
        self.host, self.together, self.span = host, together, None

    def values(self, chain: Sequence[WeightDelta]) -> list[Tensor | None]:
        """The parameters `names` of the host under one adapter."""
        out = []
        for name in self.names:
            value: Tensor | None = self.host._parameters[name]
            for delta in chain:
                value = delta.adapted(name, value) if name in delta.names() else value
            out.append(value)
        return out

    def stack(self) -> list[Tensor | None]:
        columns = zip(*map(self.values, self.deltas), strict=True)
        return [
            torch.stack([t for t in column if t is not None]) if column[0] is not None else None for column in columns
        ]

    def gather(self, stack: list[Tensor | None]) -> list[Tensor | None]:
        places = [self.places[row] for row in self.covered]
        return [None if t is None else t.index_select(0, self.table.at(places, t.device)) for t in stack]

    def __call__(self, call: Base, base: Base, x: Tensor, *rest: Any) -> Tensor:
        if rest:
            found = f"{type(self.host).__name__} takes more than one input"
            raise GraftError(f"rows at {self.key}", found, "activate one adapter at a time for its rows")
        x = self.table.wide(x, self.key)
        xs = x.reshape(self.table.rows, -1, *x.shape[1:])
        rows = self.table.at(self.covered, x.device)
        new = self._together(base, xs if self.whole else xs[rows]) if self.together else self._apart(base, xs)
        if self.whole:
            return new.flatten(0, 1)
        y = call(x)
        return y.reshape(self.table.rows, -1, *y.shape[1:]).index_copy(0, rows, new.to(y.dtype)).flatten(0, 1)

    def _run(self, base: Base, x: Tensor, values: Sequence[Tensor | None]) -> Tensor:
        with swapped([(self.host._parameters, name) for name in self.names], values):  # type: ignore[misc]
            return base(x)

    def _together(self, base: Base, xs: Tensor) -> Tensor:
        values = tuple(self.tensors())
        dims = (0, tuple(None if v is None else 0 for v in values))
        return torch.func.vmap(lambda x, v: self._run(base, x, v), in_dims=dims)(xs, values)  # type: ignore[no-any-return]

    def _one(self, base: Base, x: Tensor, chain: Sequence[Any], at: Sequence[int]) -> Tensor:
        """One adapter's rows."""
        if not any(d.overrides("product") for d in chain):
            return self._run(base, x, self.values(chain))
        side, shared = self.table.sides([self.covered[n] for n in at])
        with narrowed(self.table.runtime, shared | {name: t.flatten(0, 1) for name, t in side.items()}):
            return through(self.host, chain)(base, base, x)

    def _apart(self, base: Base, xs: Tensor) -> Tensor:
        outs, order = [], []
        for i, chain in enumerate(self.deltas):
            at = [n for n, row in enumerate(self.covered) if self.places[row] == i]
            mine = xs[self.table.at([self.covered[n] for n in at], xs.device)]
            outs.append(self._one(base, mine.flatten(0, 1), chain, at).unflatten(0, mine.shape[:2]))
            order += at
        return torch.cat(outs)[self.table.at(order, xs.device).argsort()]
