"""The backbone's parts, read once: what every graft, load and activation of one model has in common.

Reading a model costs far more than an adapter. A grafted model keeps its reading, and before each graft or load asks
whether it still holds: modules that came or went, parameters that were replaced, moved, cast or written to end it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.grafted import backbone_modules
from ..core.quantised import is_quantised
from ..core.site import Site
from ..core.weight import weight_of
from .anatomy import Anatomy, anatomy

T = TypeVar("T")


class Body:
    """One reading of a backbone, adapters left out.

    modules: by path;  parameters: by name, each once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(backbone_modules(model))
        self.parameters: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for path, module in self.modules.items():
            for name, p in module._parameters.items():
                if p is not None and id(p) not in seen:
                    seen.add(id(p))
                    self.parameters[f"{path}.{name}" if path else name] = p
        self._made: dict[Callable[..., Any], Any] = {}
        self._look = self._look_now()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_look": None, "_made": {}}  # a copy is another model: it is read again

    @cached_property
    def anatomy(self) -> Anatomy:
        """The sites."""
        return anatomy(self.modules[""])

    @cached_property
    def numbers(self) -> dict[str, Tensor]:
        """The parameters by name; of one that is held in few bits its shape, and numbers that differ from none (NaN)."""
        unknown, found = torch.tensor(math.nan), {}
        for name, p in self.parameters.items():
            path, _, leaf = name.rpartition(".")
            module = self.modules[path]
            found[name] = unknown.expand(weight_of(module).shape) if is_quantised(module, leaf) else p
        return found

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The sites by key."""
        return {site.key: site for site in self.anatomy.sites}

    def once(self, make: Callable[[Body], T]) -> T:
        """make(self), computed once."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]  # type: ignore[no-any-return]

    def holds(self) -> bool:
        """Whether the model is still what was read."""
        return self._look == self._look_now()

    def _look_now(self) -> list[Any]:
        """What differs as soon as a reading would. Identities are safe: the objects are kept here."""
        look: list[Any] = []
        for module in self.modules.values():
            look += [id(m) for name, m in module._modules.items() if name != "graft"]
            look += [id(p) for p in module._parameters.values()]
        for p in self.parameters.values():
            # a subclass (DTensor, quantised) may have no address, and what is on the meta device has none
            address = p.data_ptr() if type(p) is nn.Parameter else 0
            look += address or (p.dtype, p.device), 0 if p.is_inference() else p._version
        return look
