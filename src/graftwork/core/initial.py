"""How new parameters start: every random draw comes from the adapter's own generator, never from the global one.

An initial value is a function (tensor, generator) that fills the tensor in place. Draws are made on the CPU in float32 and then
cast, so that they are equal on every device, and nothing is drawn for a backbone on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

Initial = Callable[[Tensor, torch.Generator | None], object]


class Later:
    """Instead of a generator: every new tensor is overwritten with a stored one, and need not be drawn.

    Each is one zero that is seen everywhere, made once for all that have the same shape. It can be looked at, but not written
    into. Not whatever lies in memory: a method may look at its values (Sparse ranks them).
    """

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Tensor] = {}

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of that shape."""
        made = self._made.get((shape, dtype, device))
        if made is None or made.numel() == 1:  # a single number could be written into
            made = self._made[shape, dtype, device] = torch.zeros((), dtype=dtype, device=device).expand(shape)
        return made.data  # with a version of its own: a count of the writes to all of them would tell nothing


_generator: ContextVar[Any] = ContextVar("graftwork_generator", default=None)


@contextmanager
def drawing_from(generator: torch.Generator | Later | None) -> Iterator[None]:
    """Inside this block, `parameter` draws from `generator`, or, where that is `Later`, draws nothing."""
    token = _generator.set(generator)
    try:
        yield
    finally:
        _generator.reset(token)


def tensor(shape: tuple[int, ...], init: Initial, like: Tensor | None = None) -> Tensor:
    """A new tensor filled by `init`, on the device and of the floating dtype of `like`."""
    dtype = like.dtype if like is not None and like.is_floating_point() else torch.get_default_dtype()
    device = like.device if like is not None else torch.device("cpu")
    generator = _generator.get()
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    if isinstance(generator, Later):
        return generator.room(shape, dtype, device)
    # a drawing scope such as `torch.device("meta")` must not move the draw
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        init(values, generator)
    return values.to(device=device, dtype=dtype)


def parameter(shape: tuple[int, ...], init: Initial, like: Tensor | None = None) -> nn.Parameter:
    """A new trainable parameter filled by `init`, on the device and of the dtype of `like`."""
    return nn.Parameter(tensor(shape, init, like))


def adopt(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make stored tensors, named as in `state_dict`, the module's own. Copied only for another dtype or device."""
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        home = module.get_submodule(path) if path else module
        own = home._parameters.get(leaf)
        if own is not None:
            own.data = value.detach().to(own.device, own.dtype)
        else:
            old = home._buffers[leaf]
            assert old is not None
            home._buffers[leaf] = value.detach().to(old.device, old.dtype)


def zeros(t: Tensor, generator: torch.Generator | None = None) -> None:
    """Every entry 0."""
    t.zero_()


def ones(t: Tensor, generator: torch.Generator | None = None) -> None:
    """Every entry 1."""
    t.fill_(1.0)


def constant(value: float) -> Initial:
    """Every entry `value`."""
    return lambda t, generator: t.fill_(value)


def values(source: Tensor) -> Initial:
    """A copy of `source`."""
    return lambda t, generator: t.copy_(source.detach())


def made(make: Callable[[], Tensor]) -> Initial:
    """A copy of make(), which is called only where values are wanted: not on the meta device, nor where stored ones will follow."""
    return lambda t, generator: t.copy_(make().detach())


def normal(std: float = 1.0) -> Initial:
    """N(0, std^2)."""
    return lambda t, generator: t.normal_(0.0, std, generator=generator)


def truncated_normal(std: float) -> Initial:
    """N(0, std^2), cut at two standard deviations."""
    return lambda t, generator: nn.init.trunc_normal_(t, 0.0, std, -2 * std, 2 * std, generator=generator)


def uniform(low: float, high: float) -> Initial:
    """U(low, high)."""
    return lambda t, generator: t.uniform_(low, high, generator=generator)


def kaiming_uniform(a: float = math.sqrt(5), fan_in: int | None = None) -> Initial:
    """U(-b, b), b = sqrt(6 / ((1 + a^2) fan_in)), fan_in the last axis unless given (leading axes are a batch of matrices)."""

    def fill(t: Tensor, generator: torch.Generator | None) -> None:
        bound = math.sqrt(6 / ((1 + a * a) * (fan_in or t.shape[-1])))
        t.uniform_(-bound, bound, generator=generator)

    return fill


def xavier_uniform(gain: float = 1.0) -> Initial:
    """U(-b, b), b = gain sqrt(6 / (fan_in + fan_out)), the fans being the last two axes."""

    def fill(t: Tensor, generator: torch.Generator | None) -> None:
        bound = gain * math.sqrt(6 / (t.shape[-1] + t.shape[-2]))
        t.uniform_(-bound, bound, generator=generator)

    return fill


def orthogonal(t: Tensor, generator: torch.Generator | None = None) -> None:
    """Orthonormal rows (or columns, where there are fewer)."""
    nn.init.orthogonal_(t, generator=generator)
