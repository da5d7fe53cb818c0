"""Running a module with other tensors in the place of its own: generated, masked, adapted, or those of another adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Slot = tuple[dict[str, Any], str]  # where a tensor hangs: a module's dictionary, and the name in it


@contextmanager
def swapped(slots: Sequence[Slot], tensors: Sequence[Any]) -> Iterator[None]:
    """Inside this block the slots hold these tensors; afterwards, their own."""
    own = [home[name] for home, name in slots]
    try:
        for (home, name), t in zip(slots, tensors, strict=True):
            home[name] = t
        yield
    finally:
        for (home, name), t in zip(slots, own, strict=True):
            home[name] = t


def functional(module: nn.Module, parameters: Mapping[str, Tensor], function: str, *args: Any, **kwargs: Any) -> Any:
    """module.function(*args, **kwargs) computed with the given tensors in the place of its parameters.

    They need not be leaves: generated, masked, or one per token. The parameters are back when it returns.
    """
    slots = []
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        slots.append(((module.get_submodule(path) if path else module)._parameters, leaf))
    with swapped(slots, list(parameters.values())):
        return getattr(module, function)(*args, **kwargs)
