"""Along which axis a site has the rows of the batch: seen, not guessed from lengths, which may be equal.

One row and two rows of the first batch run through the bare backbone. Where the batch is axis 0, row by row, what a module sees of one
row is how what it sees of two rows begins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.plan import Plan, first_output, first_tensor

POSITIONS = ("position_ids", "cache_position")  # inputs that need not have the batch's rows


class Witness:
    """Stands around a module and keeps what goes in and what comes out."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module itself."""
        x = first_tensor(args, kwargs).clone()
        out = base(*args, **kwargs)
        self.seen += x, first_output(out).clone()
        return out


@torch.no_grad()
def by_rows(
    hosts: Mapping[str, nn.Module],
    model: nn.Module,
    call: Callable[..., Any],
    batch: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, bool]:
    """Of the hosts, by path: those that have the rows along axis 0 or the same input for all; whether several entries belong to a row.

    call: the forward of `model`, given (args, kwargs), which runs with the hosts' plans put aside.  batch: rows of the inputs.
    """
    passes = []
    for rows in (1, 2):
        given = [_first(rows, batch, "", value) for value in args]
        named = {name: _first(rows, batch, name, value) for name, value in kwargs.items()}
        with _witnessed(hosts, model) as witnesses, torch.random.fork_rng(devices=[]):
            try:
                call(tuple(given), named)
            except (
                Exception
            ):  # inputs that cannot be cut: nothing is known then; an error of the model's comes again in the pass
                return {}
        passes.append({path: witness.seen for path, witness in witnesses.items()})
    one, two = passes
    return {
        path: any(a.shape[0] > 1 for a in one[path])
        for path in hosts
        if 0 < len(one[path]) == len(two[path]) and all(map(_begins, two[path], one[path]))
    }


def _begins(two: Tensor, one: Tensor) -> bool:
    """Whether two rows [2 n, ...] begin with the one row [n, ...], or are the same input [1, ...] for all."""
    n = one.shape[0] if one.dim() else 0
    if not n or two.shape[1:] != one.shape[1:] or not (two.shape[0] == 2 * n or two.shape[0] == n == 1):
        return False
    a, b = one.double(), two[:n].double()
    return bool((a - b).abs().max() <= 0.02 * a.abs().max()) if a.numel() else False


def _first(rows: int, batch: int, name: str, value: Any) -> Any:
    """The first rows of an input."""
    if isinstance(value, Tensor):
        whole = value.dim() == 0 or value.shape[0] != batch or (value.dim() == 1 and name in POSITIONS)
        return value if whole else value[:rows]
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        out: Any = copy.copy(value)
        for key in value:
            out[key] = _first(rows, batch, key, value[key])
        return out
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        if len(value) == batch and not isinstance(value[0], Tensor):
            return value[:rows]
        return type(value)(_first(rows, batch, "", v) for v in value)
    return copy.deepcopy(value)  # a cache, which the model writes to


@contextmanager
def _witnessed(hosts: Mapping[str, nn.Module], model: nn.Module) -> Iterator[dict[str, Witness]]:
    """Inside this block the hosts are bare and watched, and nothing trains."""
    witnesses = {path: Witness() for path in hosts}
    records: list[Any] = [module._armed for module in hosts.values()]
    plans = [record.plan for record in records]
    training = [m for m in model.modules() if m.training]
    try:
        for record, module, witness in zip(records, hosts.values(), witnesses.values(), strict=True):
            record.plan = Plan(module)
            record.plan.around.append(witness)
        for m in training:
            m.training = False
        yield witnesses
    finally:
        for m in training:
            m.training = True
        for record, plan in zip(records, plans, strict=True):
            record.plan = plan
