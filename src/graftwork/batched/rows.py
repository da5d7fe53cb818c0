"""`rows(...)` compiled: which adapter each row of a batch has, and the groups of deltas that serve them.

The adapters' deltas are grouped by site and by what they are; the hot path sees the groups, never an adapter's name. Memory: the
parameters of all adapters once more, stacked, and once for every row (or run of rows with one adapter), while rows are active; the
stacks stay for the next `rows` over the same adapters, until one is removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import GraftError
from ..core.passes import Runtime
from .axes import POSITIONS, by_rows
from .likeness import MASK

if TYPE_CHECKING:
    from ..core.site import Site
    from .group import Group, Step

VERSION = attrgetter("_version")


class Table:
    """The rows of an activation.

    given: how many rows were named;  rows: how many runs they make, all of the same length;  index: the number of each run's
    expression, None for the bare backbone;  deltas, steps: the groups, as `install` hangs them up;
    uniform: all rows have the same expression, so that the plain plan serves them;
    epoch: moves on when a parameter has changed;  learning: some parameter asks for gradients, and the pass keeps what they need.
    hosts: the modules that are changed, by path;  paths: which of them a site's key stands for;
    unknown: those of which it is not known along which axis they have the batch.
    """

    def __init__(self, texts: Sequence[str | None], runtime: Runtime) -> None:
        numbers = {text: n for n, text in enumerate(sorted({t for t in texts if t is not None}))}
        length = math.gcd(*(len(list(run)) for _, run in groupby(texts)))
        self.given, self.runtime = len(texts), runtime
        self.index = [None if t is None else numbers[t] for t in texts[::length]]
        self.rows, self.uniform = len(self.index), len(set(self.index)) == 1
        self.deltas: list[tuple[Site, Any]] = []
        self.steps: list[tuple[str, Step]] = []
        self.parameters: list[Tensor] = []
        self.dropping: str | None = None  # what has dropout
        self.batch, self.lengths, self.uneven = self.given, set[int](), ""
        self.epoch, self.learning = 0, False
        self.state: tuple[Any, ...] = ()
        self.indices: dict[Any, Tensor] = {}
        self.hosts: dict[str, nn.Module] = {}
        self.paths: dict[str, set[str]] = {}
        self.unknown: dict[str, nn.Module] = {}
        self._looked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_looked": set()}

    def at(self, places: Sequence[int], device: torch.device) -> Tensor:
        """These numbers as a tensor, which is moved to the device once."""
        key = tuple(places), device
        if key not in self.indices:
            self.indices[key] = torch.tensor(places, device=device)
        return self.indices[key]

    def begin(self, training: bool, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        """A pass begins with these inputs. GraftError where they are not the rows that were named."""
        given = [*(("", t) for t in args), *kwargs.items()]
        inputs = [(name, t) for name, t in given if isinstance(t, Tensor) and t.dim() and name not in POSITIONS]
        if not inputs:
            raise GraftError(
                f"a pass with {self.given} rows", "no tensor among the inputs", "call the model with a batch"
            )
        main = next((t for _, t in inputs if t.dim() > 1), inputs[0][1])
        self.batch = main.shape[0]
        if self.batch != self.given and not (self.runtime.generating and self.batch % self.given == 0 and self.batch):
            found = f"a batch of {self.batch} and {self.given} names in rows(...)"
            raise GraftError(
                "one adapter per row", found, "give one name for each row of the batch, None for the backbone"
            )
        self.lengths = {t.shape[1] for _, t in inputs if t.dim() > 1 and t.shape[0] == self.batch}
        self.uneven = next((n or "an input" for n, t in inputs if t.dim() > 2 and t.shape[0] != self.batch), "")
        if training and self.dropping:
            do = "call model.eval(), set dropout=0, or train one adapter at a time"
            raise GraftError("train with one adapter per row", f"{self.dropping} has dropout", do)
        self.learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters)
        self._notice()

    def _notice(self) -> None:
        """Have the parameters moved since they were stacked?"""
        if self.parameters:
            first = self.parameters[0]
            state = (
                sum(map(VERSION, self.parameters)),
                first.dtype,
                first.device,
                torch.is_inference_mode_enabled(),
            )
            if state != self.state:
                self.state, self.epoch = state, self.epoch + 1

    def stacked(self, group: Group, make: Callable[[], list[Tensor | None]]) -> list[Tensor | None]:
        """The group's stack: the one that an earlier activation left, where nothing has moved since, or a new one."""
        tensors = list(tensors_of(group.deltas))
        key = group.identity
        now = (versions(tensors), [(t.dtype, t.device) for t in tensors[:1]], torch.is_inference_mode_enabled())
        kept = self.runtime.stacks.get(key)
        if kept is None or kept[0] != now:
            self.runtime.stacks[key] = kept = (
                now,
                make(),
                group.deltas,
            )  # the deltas are held, so that ids stay theirs
        return kept[1]  # type: ignore[no-any-return]

    def prune(self) -> None:
        """Let the stacks go that no group of this activation uses."""
        used = {group.identity for _, group in (*self.deltas, *self.steps)}
        for key in [key for key in self.runtime.stacks if key not in used]:
            del self.runtime.stacks[key]

    def host(self, key: str, path: str, module: nn.Module) -> None:
        """The site of this key is changed at this module."""
        self.hosts[path] = module
        self.paths.setdefault(key, set()).add(path)
        if path not in self.runtime.by_rows:
            self.unknown[path] = module

    def look(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Before the first pass through a part of the model: find out about its hosts."""
        if torch.compiler.is_compiling() or self.batch < 2 or id(module) in self._looked:
            return
        self._looked.add(id(module))
        self.runtime.by_rows |= by_rows(self.hosts, module, call, self.batch, args, kwargs)
        self.unknown = {path: m for path, m in self.unknown.items() if path not in self.runtime.by_rows}

    def check(self, t: Tensor, key: str) -> None:
        """GraftError unless axis 0 of the input of a site is the batch, or the batch with each row several times in a row."""
        n, batch = t.shape[0], self.batch
        spots = t.dim() - t.is_floating_point()  # axes that may be the batch: all but the features
        if n == batch and (t.shape[1] != batch if spots > 1 else batch not in self.lengths):
            return  # no other axis is as long
        known = [self.runtime.by_rows.get(path) for path in self.paths[key]]
        if n % batch == 0 and None not in known and (n == batch or all(known)):
            return
        if self.uneven and n != batch:
            found = f"{n} entries along axis 0 for a batch of {batch}, and {self.uneven} has another number of rows"
        elif n % batch:
            found = f"{n} entries along axis 0, no multiple of the batch's {batch} rows"
        else:
            found = f"{list(t.shape)} for a batch of {batch}, and its axis 0 is not known to be the rows, one after the other"
        do = "activate one adapter at a time for its rows, or begin with an uncompiled pass of another length"
        raise GraftError(f"the rows of the batch at {key}", found, do)

    def wide(self, t: Tensor, key: str) -> Tensor:
        """The input of a site for the whole batch; one that is the same for all rows (positions) is repeated."""
        if t.shape[0] == 1 < self.batch and all(path in self.runtime.by_rows for path in self.paths[key]):
            return t.expand(self.batch, *t.shape[1:])
        self.check(t, key)
        return t

    def sides(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The padding mask and the context: what has a value per row, as [these rows, k, ...], and what all share."""
        each: dict[str, Tensor] = {}
        shared: dict[str, Any] = {}
        for name, value in {MASK: self.runtime.mask, **self.runtime.context}.items():
            t = value
            if isinstance(value, list | tuple) and len(value) == self.batch and not isinstance(value[0], str):
                t = torch.as_tensor(value)
            if isinstance(t, Tensor) and t.dim() and t.shape[0] == self.batch:
                each[name] = t.reshape(self.rows, -1, *t.shape[1:])[self.at(rows, t.device)]
            else:
                shared[name] = value
        return each, shared


def versions(tensors: Iterable[Tensor]) -> int:
    """A number that grows with every change of one of the tensors."""
    return sum(t._version for t in tensors if not t.is_inference())


def tensors_of(deltas: Iterable[Any]) -> Iterable[Tensor]:
    """Every parameter and buffer of deltas, or of lists of them."""
    for delta in deltas:
        if isinstance(delta, nn.Module):
            yield from (t for t in (*delta._parameters.values(), *delta._buffers.values()) if t is not None)
            yield from tensors_of(m for m in delta._modules.values() if m is not None)
        else:
            yield from tensors_of(delta)


def check_order(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> None:
    """GraftError where a module that is adapted has the batch as its second axis."""
    kinds = (nn.MultiheadAttention, nn.RNNBase, nn.Transformer)
    second = [path for path, m in modules.items() if isinstance(m, kinds) and not m.batch_first]
    for path in paths:
        for at in second:
            around = at.rpartition(".")[0]
            if path == at or path.startswith(f"{around}." if around else ""):
                found = f"{at} takes [seq, batch, d]: its axis 0 is not the batch"
                raise GraftError(
                    f"one adapter per row at {path}", found, "use batch_first=True, or one adapter at a time"
                )
