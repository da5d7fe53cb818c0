"""The one mechanism: a site's module keeps its identity, its class is swapped for a cached dynamic subclass.

`Grafted<Class>(Grafted, Class)` hands its `forward` to the module's record (`Armed`), and carries a property in the name of every
re-parameterised weight, so that the host's own forward and everybody who reads the weight around the module see the adapted value.
The subclass keeps the original name and signature: auto-wrapping by class name, `inspect.signature(model.forward)` and `repr` see
the backbone. No wrapper modules, no hooks; restoring the class restores the module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .armed import Armed
from .attention import attending_config
from .passes import Runtime

# Attributes that read otherwise while adapters are active. A fused fast path that would compute a whole block without calling the
# modules inside it is switched off by the attribute that guards it (while deltas other than weights are active below); a frozen
# BatchNorm normalises by its running statistics, which training would otherwise move: they belong to the backbone.
OVERRIDES: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
    _BatchNorm: {"training": False},
}


class Graft(nn.Module):
    """The child of a grafted module that holds its deltas, one slot per adapter and method."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        # past nn.Module's __setattr__, which first asks what a value is: most of the time of making one
        self.__dict__["runtime"] = runtime

    runtime: Runtime


def backbone_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the backbone by path, each once; what adapters hung into it is not walked."""
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen or isinstance(module, Graft):
            continue
        seen.add(id(module))
        yield path, module
        below = [(f"{path}.{name}" if path else name, m) for name, m in module._modules.items() if m is not None]
        waiting += reversed(below)


class Grafted:
    """Mixin of every grafted class."""

    _armed: Armed
    _graft_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (original_class(type(self)), self._graft_names), self.__getstate__()  # type: ignore[attr-defined]


def original_class(cls: type) -> type:
    """The class a module had before it was grafted."""
    return cls.__mro__[2] if issubclass(cls, Grafted) else cls


def _rebuild(cls: Any, names: tuple[str, ...]) -> nn.Module:
    grafted: Any = grafted_class(cls, names)
    return grafted.__new__(grafted)  # type: ignore[no-any-return]


@functools.cache
def grafted_class(cls: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """The dynamic subclass of `cls` with a property for each parameter in `names`."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get("_armed")
        if record is None:  # somebody kept this forward (accelerate wraps it), and the module has its own class again
            return cls.forward(self, *args, **kwargs)
        return record.run(self, cls.forward, args, kwargs)

    namespace: dict[str, Any] = {
        "forward": forward,
        "_graft_names": names,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if hasattr(cls, "generate"):
        namespace["generate"] = _generating(cls.generate)
    if not hasattr(cls, "config"):
        namespace["config"] = property(attending_config, _writer("config"))
    for name in names:
        namespace[name] = property(_reader(name))
    for guarded, attributes in OVERRIDES.items():
        if issubclass(cls, guarded):
            for name, value in attributes.items():
                namespace[name] = property(_guard(name, value), _writer(name))
    return type(cls.__name__, (Grafted, cls), namespace)


def _reader(name: str) -> Callable[[Any], Any]:
    def read(module: Any) -> Any:
        return module._armed.read(module, name)

    return read


def _generating(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._armed.runtime.generation():
            return generate(self, *args, **kwargs)

    return run


def _guard(name: str, value: Any) -> Callable[[Any], Any]:
    def read(module: Any) -> Any:
        return value if module._armed.overriding else module.__dict__[name]

    return read


def _writer(name: str) -> Callable[[Any, Any], None]:
    def write(module: Any, value: Any) -> None:
        module.__dict__[name] = value

    return write


def arm(module: nn.Module, names: tuple[str, ...], record: Armed) -> None:
    """Swap the module's class for its grafted one, with properties for `names`."""
    cls = grafted_class(original_class(type(module)), tuple(sorted(names)))
    module.__dict__["_armed"] = record
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)  # past nn.Module's questions of what kind of value it is


def disarm(module: nn.Module) -> None:
    """Give the module its own class back."""
    object.__setattr__(module, "__class__", original_class(type(module)))
    module.__dict__.pop("_armed", None)


def armed(module: nn.Module) -> Armed | None:
    """The record of a module whose class is swapped, otherwise None."""
    return module.__dict__.get("_armed")
