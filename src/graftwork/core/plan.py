"""What one grafted module does in a pass: a flat list of steps, compiled once per activation. The hot path walks it.

No adapter name is looked up here and no expression is walked; a module without a plan is the backbone's own code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta import Delta, WeightDelta
from .errors import GraftError
from .kept import Keeper
from .passes import Runtime
from .site import Site
from .weight import Weight, is_conv1d


class Host:
    """What a fast path may ask about its host: the dense weight [out, in] and the bias [out] it was called with.

    direct: what the fast path gets as its base is the host's own product x W^T + b, and not another delta's.
    """

    def __init__(self, module: nn.Module, view: Weight, first: bool) -> None:
        self.module, self.view = module, view
        own = inspect.unwrap(type(module).forward)  # that of the class before it was grafted
        self.direct = first and not view.rows and (own is nn.Linear.forward or is_conv1d(module))

    @property
    def frozen_product(self) -> bool:
        """Whether the base is x W^T + b of plain tensors that take no gradient: it can be computed elsewhere."""
        if not self.direct:
            return False
        weight = self.module._parameters[self.view.name]
        bias = None if self.view.bias is None else self.module._parameters[self.view.bias]
        return type(weight) is nn.Parameter and not weight.requires_grad and (bias is None or not bias.requires_grad)

    @property
    def weight(self) -> Tensor:
        stored = self.module._parameters[self.view.name]
        assert stored is not None
        return self.view.dense(stored)

    @property
    def bias(self) -> Tensor | None:
        return None if self.view.bias is None else self.view.bias_of(self.module._parameters[self.view.bias])


class Plan:
    """The steps of one module, in the order of the active adapters and their methods."""

    def __init__(self, module: nn.Module) -> None:
        self.weights: dict[str, list[WeightDelta]] = {}  # parameter name -> deltas, first applied first
        self.linear: list[tuple[WeightDelta, Host]] = []  # the fast path, empty where there is none
        # a weight for each row or token: each step calls the one before it, the module first
        self.rowwise: list[Callable[..., Tensor]] = []
        self.capture: list[Delta] = []  # deltas elsewhere that want this module's input
        self.enter: list[Delta] = []
        self.amend: list[Delta] = []
        self.forward: list[tuple[Delta, int]] = []  # delta, width of the site
        self.attend: list[Delta] = []
        self.around: list[Delta] = []
        self.channels_first = channels_first(module)
        self.decodes = False  # the host's own forward asks for a weight of codes, which the adapted one is not
        self.keeps = False  # adapted weights are kept from one inference pass to the next
        self._kept: Keeper[Tensor | None] = Keeper()

    def compile(self, module: nn.Module) -> None:
        """Choose the fast path, once every delta is known."""
        distinct = list(dict.fromkeys(d for chain in self.weights.values() for d in chain))
        if not distinct or self.rowwise:
            return
        fast = all(d.view.linear and d.overrides("linear") for d in distinct)
        # the first sees the backbone's own product, so that it need not be additive
        if fast and (all(d.additive for d in distinct[1:]) or disjoint(distinct)):
            self.linear = [(d, Host(module, d.view, first=i == 0)) for i, d in enumerate(distinct)]
        self.decodes = any(d.view.codes is not None for d in self.weights.get("weight", ()))
        lasting = all(d.lasting for d in distinct) and not self.decodes  # kept, it would cost more than the backbone's
        self.keeps = lasting and (not self.linear or any(map(_dear, distinct)))
        if self.keeps:
            sources = (m for d in distinct for source in d.sources() for m in source.modules())
            self._kept = Keeper([module, *sources])

    def adapted(self, module: nn.Module, name: str) -> Tensor | None:
        """The module's parameter `name`, adapted."""
        value = module._parameters[name]
        for delta in self.weights[name]:
            value = delta.adapted(name, value)  # type: ignore[assignment]
        return value

    def kept(self, module: nn.Module, name: str) -> Tensor | None:
        """`adapted`, computed again only where a tensor it is made of was replaced or written to since."""
        return self._kept.get(name, lambda: self.adapted(module, name))

    def drop_kept(self) -> None:
        """Free the kept weights."""
        self._kept.clear()

    def run(
        self, base: Callable[..., Any], runtime: Runtime, thin: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the module returns in this pass. thin: by the fast path, where there is one."""
        if not (self.forward or self.rowwise or self.capture or self.enter or self.amend or self.around):
            return self._product(base, args, kwargs) if thin else base(*args, **kwargs)
        call = partial(self._inner, base, runtime, thin)
        for delta in self.around:
            call = partial(delta.around, call)
        return call(*args, **kwargs)

    def _inner(self, base: Callable[..., Any], runtime: Runtime, thin: bool, *args: Any, **kwargs: Any) -> Any:
        x = None
        if self.capture or self.enter or self.forward:
            x = first_tensor(args, kwargs)
            for delta in self.capture:
                runtime.state[delta] = self._last(x), len(runtime.parts)
            if self.enter:
                edited = self._last(x)
                for delta in self.enter:
                    edited = delta.enter(edited)
                args, kwargs = replace_first(args, kwargs, x, self._stored(edited))
        for delta in self.amend:
            given = first_tensor(args, kwargs)
            call = partial(self._output, base, thin, args, kwargs, given)
            args, kwargs = replace_first(args, kwargs, given, self._stored(delta.amend(self._last(given), call)))
        out = self._called(base, thin, args, kwargs)
        return self._edit(out, x, runtime) if self.forward else out

    def _called(self, base: Callable[..., Any], thin: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module with its adapted weights."""
        if not self.rowwise:
            return self._product(base, args, kwargs) if thin and self.linear else base(*args, **kwargs)
        below = base
        for step in self.rowwise:
            below = partial(step, below, base)
        return below(*args, *kwargs.values())

    def _output(
        self,
        base: Callable[..., Any],
        thin: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: Tensor,
        x: Tensor,
    ) -> Tensor:
        """The output, channels last, for x [.., d] in the place of the main input `given`."""
        args, kwargs = replace_first(args, kwargs, given, self._stored(x))
        return self._last(first_output(self._called(base, thin, args, kwargs)))  # type: ignore[no-any-return]

    def _product(self, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        *inner, (last, at) = self.linear
        if not inner and last.view.rows is None:
            (x,) = (*args, *kwargs.values())
            return last.linear(x, base, at)
        call: Callable[[Tensor], Tensor] = base
        for delta, host in self.linear:
            call = (
                partial(on_rows, delta, call, host) if delta.view.rows else partial(delta.linear, base=call, host=host)
            )
        return call(*args, *kwargs.values())

    def _edit(self, out: Any, x: Any, runtime: Runtime) -> Any:
        y = first_output(out)
        y0 = y
        for delta, _ in self.forward:
            y = self._stored(delta.forward(reading(delta, self._last(x), runtime), self._last(y)))
        return y if out is y0 else replace_output(out, y)

    def _last(self, t: Any) -> Any:
        return t.movedim(1, -1) if self.channels_first and t.dim() > 2 else t

    def _stored(self, t: Tensor) -> Tensor:
        return t.movedim(-1, 1) if self.channels_first and t.dim() > 2 else t


def _dear(delta: WeightDelta) -> bool:
    """Whether its fast path costs more than a tenth of the host's own product."""
    work = delta.work()
    return work > 0 and 10 * work > math.prod(delta.view.shape[-2:])


def on_rows(delta: WeightDelta, base: Callable[[Tensor], Tensor], host: Host, x: Tensor) -> Tensor:
    """The fast path on a slice of the host's output (q inside a packed qkv)."""
    y = base(x)
    a, b = delta.view.rows or (0, y.shape[-1])
    part = y[..., a:b]
    # where it changes the input, it asks for these outputs again
    new = delta.linear(x, lambda given: part if given is x else F.linear(given, host.weight, host.bias), host)
    # what was not written in place may have kept `part` for the backward pass: y must stay as it is
    return y if new is part else torch.cat([y[..., :a], new, y[..., b:]], dim=-1)


def reading(delta: Delta, x: Any, runtime: Runtime) -> Any:
    """What a delta reads beside the output that it edits: x, the module's input, or what was captured for it in this pass."""
    if delta.source == "input":
        return x
    captured = runtime.state.pop(delta, None)
    if captured is None:
        raise GraftError(
            f"the {delta.source} of {delta.key}",
            "it was not computed before the site's output in this pass",
            "this block has another order (post-norm?); choose another position or another `at`",
        )
    return runtime.part(*captured)


def read_path(site: Site, delta: Delta) -> str:
    """The module whose input a delta reads or edits."""
    path = site.entered if delta.overrides("enter") else site.norm if delta.source == "norm" else site.entry
    if path is None:
        raise GraftError(
            f"the {delta.source} of {site.key}", "this site has none", "choose another position or another `at`"
        )
    return path


def disjoint(deltas: list[WeightDelta]) -> bool:
    """Whether no two of the deltas touch the same rows of the host's weight, so that the order does not matter."""
    spans = sorted(d.view.rows or (0, d.view.stored[0]) for d in deltas if d.view.rows or len(deltas) == 1)
    return len(spans) == len(deltas) and all(a[1] <= b[0] for a, b in pairwise(spans))


def vectors(module: nn.Module) -> bool:
    """Whether the module holds vectors and nothing else, as a norm does."""
    own = [p for p in module._parameters.values() if p is not None]
    return all(name == "graft" for name in module._modules) and all(p.dim() < 2 for p in own)


def whole(module: nn.Module, site: Site) -> bool:
    """Whether the module can run with another weight for each row: axis 0 of its one input is the batch, and stays apart."""
    linear = getattr(module, "weight", None) is not None and site.weight.linear
    return linear or vectors(module) or isinstance(module, nn.modules.conv._ConvNd | nn.Embedding)


def channels_first(module: nn.Module) -> bool:
    """Whether the module's activations are [batch, channels, *space]."""
    if isinstance(module, nn.Linear):  # most of all sites
        return False
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        return True
    kinds = {_is_conv(m) for m in _own(module) if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear, nn.LayerNorm))}
    return kinds == {True}


def _own(module: nn.Module) -> Iterator[nn.Module]:
    """The module and what is below it, without the adapters that hang there."""
    yield module
    for name, child in module._modules.items():
        if child is not None and name != "graft":
            yield from _own(child)


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's main input: its first tensor, positional ones first."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise GraftError("the input of a grafted module", "no tensor among its arguments", "graft another site")


def replace_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the main input replaced."""
    return tuple(new if a is old else a for a in args), {k: new if v is old else v for k, v in kwargs.items()}


def first_output(out: Any) -> Tensor:
    """The module's main output: itself, or the first of a tuple or of a mapping (a transformers ModelOutput)."""
    if isinstance(out, Tensor):
        return out
    first = next(iter(out.values())) if hasattr(out, "values") else out[0]
    if not isinstance(first, Tensor):
        raise GraftError(
            "the output of a grafted module", f"its first value is {type(first).__name__}", "graft another site"
        )
    return first


def replace_output(out: Any, new: Tensor) -> Any:
    """The same container with its first value replaced."""
    if hasattr(out, "values"):
        out[next(iter(out))] = new
        return out
    if hasattr(out, "_replace"):  # a named tuple
        return out._replace(**{out._fields[0]: new})
    return type(out)([new, *out[1:]])
