"""The one mechanism: a site's module keeps its identity, its class is swapped for a cached dynamic subclass.

`Grafted<Class>(Grafted, Class)` hands its `forward` to the module's `graft`, and carries a property in the name of every
re-parameterised weight, so that the host's own forward and everybody who reads the weight around the module see the adapted value.
The subclass keeps the original name and signature: auto-wrapping by class name, `inspect.signature(model.forward)` and `repr` see
the backbone. No wrapper modules, no hooks; restoring the class restores the module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attention import attending_config, intercept, uses_interface
from .passes import Runtime
from .plan import Plan

# Attributes that read otherwise while adapters are active. A fused fast path that would compute a whole block without calling the
# modules inside it is switched off by the attribute that guards it (while deltas other than weights are active below); a frozen
# BatchNorm normalises by its running statistics, which training would otherwise move: they belong to the backbone.
OVERRIDES: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
    _BatchNorm: {"training": False},
}


class Graft(nn.Module):
    """The child of a grafted module that holds its deltas, one slot per adapter and method, and its current plan.

    opener: the module has no delta of its own; it opens the pass for the sites below it.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        # past nn.Module's __setattr__, which first asks what a value is: most of the time of making one
        self.__dict__.update(
            runtime=runtime,
            plan=None,
            plain=False,
            attending=False,
            overriding=False,
            cache=None,
            reached=False,
            is_root=False,
            mask_at=None,
        )

    runtime: Runtime
    plan: Plan | None
    plain: bool  # the host's own read of its weight, inside a fast path
    attending: bool
    overriding: bool  # the module's attributes in OVERRIDES read as there
    cache: dict[str, Tensor | None] | None  # adapted parameters during one call of the host
    reached: bool  # the module was called since its plan was made
    is_root: bool
    mask_at: int | None  # position of attention_mask in the root's forward

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None, "plain": False, "attending": False}

    def follow(self, plan: Plan | None, overriding: bool) -> None:
        """Take a plan, which no pass has reached yet."""
        self.__dict__.update(plan=plan, overriding=overriding, reached=False)

    def run(self, module: nn.Module, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The grafted module's forward."""
        runtime, plan = self.runtime, self.plan
        # a part that is called by itself (the encoder, by `generate`) begins a pass too, unless it is run again backwards
        outermost = runtime.depth == 0 and (self.is_root or not runtime.open)
        if outermost:
            mask = kwargs.get("attention_mask")
            if mask is None and self.mask_at is not None and len(args) > self.mask_at:
                mask = args[self.mask_at]
            if runtime.rows is not None:
                runtime.rows.begin(module.training, args, kwargs)
            self.begin(module.training, mask if self.is_root or (mask is not None and mask.dim() == 2) else None)
        runtime.depth += 1
        try:
            if plan is None:
                return base(*args, **kwargs)
            self.reached = True
            if plan.attend:
                return self._attend(module, plan, base, args, kwargs)
            keeping = plan.keeps and self._keeping(module, plan)
            thin = bool(plan.linear) and not keeping
            before = self.cache, self.plain
            self.cache = {name: plan.kept(module, name) for name in plan.weights} if keeping else {}
            self.plain = thin or bool(plan.rowwise)
            try:
                return plan.run(base, runtime, thin, args, kwargs)
            finally:
                self.cache, self.plain = before
        finally:
            runtime.depth -= 1
            if outermost:
                runtime.end()

    def begin(self, training: bool, mask: Tensor | None) -> None:
        """The model itself was called."""
        self.runtime.begin(mask)

    def _attend(
        self, module: nn.Module, plan: Plan, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.cache, self.attending = {}, uses_interface(module)
        try:
            with intercept(module, plan.attend):
                return plan.run(base, self.runtime, False, args, kwargs)
        finally:
            self.cache, self.attending = None, False

    def _keeping(self, module: nn.Module, plan: Plan) -> bool:
        """Whether this pass uses weights that are kept between passes; one that trains frees them."""
        if torch.compiler.is_compiling():
            return False
        if self.runtime.keeps_weights and not torch.is_grad_enabled() and not module.training:
            return True
        plan.drop_kept()
        return False

    def read(self, module: nn.Module, name: str) -> Tensor | None:
        """The value of the host's parameter `name`: adapted inside a pass, plain outside of one."""
        if self.cache is not None and name in self.cache:
            return self.cache[name]
        stored = module._parameters[name]
        plan = self.plan
        if plan is None or self.plain or name not in plan.weights or not self.runtime.open:
            return stored
        keeping = plan.keeps and self._keeping(module, plan)
        value = plan.kept(module, name) if keeping else plan.adapted(module, name)
        if self.cache is not None:
            self.cache[name] = value
        return value


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

    graft: Graft
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
        return self.graft.run(self, functools.partial(cls.forward, self), args, kwargs)

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
        return module.graft.read(module, name)

    return read


def _generating(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.graft.runtime.generation():
            return generate(self, *args, **kwargs)

    return run


def _guard(name: str, value: Any) -> Callable[[Any], Any]:
    def read(module: Any) -> Any:
        return value if module.graft.overriding else module.__dict__[name]

    return read


def _writer(name: str) -> Callable[[Any, Any], None]:
    def write(module: Any, value: Any) -> None:
        module.__dict__[name] = value

    return write


def arm(module: nn.Module, names: tuple[str, ...]) -> None:
    """Swap the module's class for its grafted one, with properties for `names`."""
    cls = grafted_class(original_class(type(module)), tuple(sorted(names)))
    if type(module) is not cls:
        module.__class__ = cls


def disarm(module: nn.Module) -> None:
    """Give the module its own class back."""
    module.__class__ = original_class(type(module))
