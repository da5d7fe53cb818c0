"""A weight that is not one matrix in this pass: who asks for its shape gets it, who computes with it a refusal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import GraftError

CALLED = "activate it without other adapters that rewrite this weight, on a layer that is called itself"  # what to do


def unreadable(name: str, stored: Tensor | None, key: str, of: str, do: str) -> Tensor:
    """A weight that each row (or token: `of`) has another one of, for whoever reads it around the module. do: what to do instead."""
    about = (
        f"the adapted {name!r} at {key}",
        f"something reads it without calling the module, and each {of} has another one",
        do,
    )
    if stored is None:
        raise GraftError(*about)
    if isinstance(stored, PerRow):
        return stored
    seen: PerRow = stored.detach().as_subclass(PerRow)  # type: ignore[no-untyped-call]
    seen.about = about
    return seen


_T: Any = torch.Tensor
_SAID = {
    getattr(_T, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_meta")
}
_SAID |= {_T.size, _T.dim, _T.numel, _T.is_floating_point, _T.element_size, _T.__len__}


class PerRow(torch.Tensor):
    """A weight that each row has another one of: models ask for its dtype, but nobody may compute with it. about: the refusal."""

    about: tuple[str, str, str] = ("", "", "")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SAID:
            return super().__torch_function__(func, types, args, kwargs or {})
        flat = [
            a for arg in (*args, *(kwargs or {}).values()) for a in (arg if isinstance(arg, list | tuple) else [arg])
        ]
        raise GraftError(*next((a.about for a in flat if isinstance(a, cls)), cls.about))
