"""Tensors that are kept from one inference pass to the next, and made again when something they are made of has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Made(Generic[T]):
    """A value, and the tensors it was made of with their versions and addresses then."""

    of: list[tuple[Tensor, int, int]]
    value: T


class Keeper(Generic[T]):
    """Values by name, made of the parameters and buffers of some modules."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        tables = [table for m in dict.fromkeys(modules) for table in (m._parameters, m._buffers)]
        self._sources: list[tuple[dict[str, Any], str]] = [(t, n) for t in tables for n in t if t[n] is not None]
        self._made: dict[str, Made[T]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def __len__(self) -> int:
        return len(self._made)

    def get(self, name: str, make: Callable[[], T]) -> T:
        """make(), computed again only where a tensor it is made of was replaced or written to since."""
        found = self._made.get(name)
        if found is not None:
            for (table, key), (tensor, version, pointer) in zip(self._sources, found.of, strict=True):
                if table[key] is not tensor or tensor._version != version or tensor.data_ptr() != pointer:
                    break
            else:
                return found.value
        tensors = [table[key] for table, key in self._sources]
        value = make()
        if not any(t.is_inference() for t in tensors):  # these do not count how often they are written to
            self._made[name] = Made([(t, t._version, t.data_ptr()) for t in tensors], value)
        return value

    def clear(self) -> None:
        """Free what is kept."""
        self._made.clear()
