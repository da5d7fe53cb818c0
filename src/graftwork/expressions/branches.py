"""`a | b`: several expressions over one batch, each with an output of its own.

The modules that are called before the first adapter of any branch run once, in the first branch; the others are handed what they gave.
From there on each branch runs by itself, with its own plans, so that heads of different sizes and every method can stand side by
side, and each output is to the bit what that branch gives alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import GraftError
from .algebra import A, Beside

if TYPE_CHECKING:
    from ..core.armed import Armed

Call = Callable[..., Any]


class Branches:
    """The branches of an activation.

    texts: what the outputs are called;  records: of every module that is armed, with one plan for each branch.
    given: what the modules below the adapters gave in this pass, in the order of their calls;  apart: the branch has reached an adapter.
    """

    def __init__(self, e: Beside, model: nn.Module) -> None:
        self.texts = tuple(t.name if isinstance(t, A) else str(t) for t in e.of)
        if len(set(self.texts)) < len(self.texts):
            raise GraftError(
                f"activate {e}", "two branches are the same", "name each once: they return one output each"
            )
        self.caches = "use_cache" in inspect.signature(model.forward).parameters
        self.records: list[Armed] = []
        self.given: list[tuple[nn.Module, Any, list[int]]] = []
        self.first, self.apart, self.next = True, False, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": []}

    def below(self, modules: Mapping[str, nn.Module], planned: set[str], above: set[str]) -> Iterator[str]:
        """Paths of the outermost modules that hold no adapter. planned: of those with one;  above: of what is around them."""
        open_paths = {path for path in modules if path in above and path not in planned}
        for path, module in modules.items():
            parent = path.rpartition(".")[0]
            if path in planned or path in above or parent not in open_paths:
                continue
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                open_paths.add(path)  # it is never called itself
            else:
                yield path

    def run(self, one: Call, kwargs: Mapping[str, Any], generating: bool) -> dict[str, Any]:
        """{text of a branch: what `one` returns for the keyword arguments}, for each branch.

        Raises GraftError where the pass has a key-value cache: it would hold what another branch has put there.
        """
        if generating or kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            do = "generate with one branch at a time, or give each row its own with rows(...)"
            raise GraftError(f"{' | '.join(self.texts)} with a key-value cache", "one cache for several branches", do)
        given = {**kwargs, "use_cache": False} if self.caches else kwargs
        outs = {}
        try:
            for i, text in enumerate(self.texts):
                self._follow(i)
                self.first, self.apart, self.next = i == 0, False, 0
                outs[text] = one(dict(given))
        finally:
            self.given = []
            self._follow(0)
        return outs

    def by_itself(self, module: nn.Module) -> GraftError:
        """The refusal of a part of the model that runs outside of a pass of the model."""
        found = f"{type(module).__name__} runs outside of the model's own pass (called by itself, or again by gradient checkpointing)"
        do = "call the whole model, without gradient checkpointing, or activate one branch at a time"
        return GraftError(" | ".join(self.texts), found, do)

    def _follow(self, i: int) -> None:
        for record in self.records:
            record.plan = record.plans[i]

    def once(self, module: nn.Module, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a module without adapters: known, where an earlier branch has called it before its first adapter."""
        if self.apart or torch.compiler.is_compiling():  # a compiler finds what is computed twice by itself
            return forward(module, *args, **kwargs)
        if self.first:
            out = forward(module, *args, **kwargs)
            kept = _copied(out) if torch.is_inference_mode_enabled() else out
            self.apart = kept is None
            if not self.apart:
                self.given.append((module, kept, _versions(kept)))
            return out
        known = self.given[self.next] if self.next < len(self.given) else None
        if known is not None and known[0] is module and _versions(known[1]) == known[2]:
            self.next += 1
            return known[1]
        self.apart = True
        return forward(module, *args, **kwargs)


def _versions(out: Any) -> list[int]:
    """How often each tensor of an output was written to."""
    if isinstance(out, Tensor):
        return [] if out.is_inference() else [out._version]
    inner = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple | list) else ()
    return [version for t in inner for version in _versions(t)]


def _copied(out: Any) -> Any:
    """The output with tensors of its own, as nobody can tell whether one made in inference mode was written to; None for others."""
    if isinstance(out, Tensor):
        return out.clone()
    parts = [_copied(t) for t in out] if type(out) is tuple else [None]
    return None if any(t is None for t in parts) else tuple(parts)
