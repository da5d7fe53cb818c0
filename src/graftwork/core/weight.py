"""One dense [out, in] view of any host's weight, so that no method ever looks at a host.

| host | stored | dense view |
| --- | --- | --- |
| Linear | [out, in] | the same |
| transformers Conv1D | [in, out] | transposed |
| Conv1d/2d/3d | [out, in/groups, *kernel] | [out, in/groups * kernel] |
| ConvTranspose | [in, out/groups, *kernel] | [out/groups * kernel, in] |
| Embedding | [vocab, d] | [d, vocab] |
| MultiheadAttention | in_proj_weight [3d, d] | a slice of its rows |
| experts, a bare parameter | [E, out, in] or [E, in, out] | [E, out, in] |
| norm scale | [d] | [d], a vector |
| quantised Linear | codes | their values, [out, in] |

Views are free (no copy), but that of codes; `dense` and `restore` are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .errors import GraftError
from .initial import Initial, parameter
from .quantised import is_codes, is_quantised, values


@dataclass(frozen=True)
class Weight:
    """The dense view of one parameter of one host. Holds shapes, never the tensor.

    name, bias: names of the parameters on the host (bias None: the host has no place for one).
    shape: (*batch, out, in), or (d,) for a vector;  linear: calling the host is y = x W^T + b over the last axis;
    lookup: calling the host picks columns of W by index (Embedding).
    """

    name: str
    bias: str | None
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    layout: str = "plain"  # plain | transposed | kernel
    rows: tuple[int, int] | None = None
    linear: bool = False
    lookup: bool = False
    like: Tensor | None = None  # an empty tensor with the host's dtype and device
    codes: nn.Module | None = (
        None  # the host, where it holds the weight in few bits: `stored` is then the shape of the values
    )

    @property
    def d_out(self) -> int:
        return self.shape[-2] if len(self.shape) > 1 else self.shape[0]

    @property
    def d_in(self) -> int:
        return self.shape[-1]

    @property
    def batch(self) -> tuple[int, ...]:
        """Leading axes: (E,) for experts, () otherwise."""
        return self.shape[:-2]

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1

    @property
    def copies(self) -> int:
        """How many matrices the view holds (E for experts)."""
        return math.prod(self.batch)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution, whose last axis of the dense view is in / groups * kernel; () for others."""
        return self.stored[2:] if self.layout == "kernel" else ()

    def require_matrix(self, method: str, dropout: float = 0.0) -> None:
        """GraftError unless the view is a matrix, and, with dropout on its input, unless the host multiplies by it."""
        if not self.is_matrix:
            raise GraftError(
                f"{method} on {self.name!r}",
                f"a vector of {self.shape[0]} numbers",
                "it needs a matrix; use full or bitfit",
            )
        if dropout and not self.linear:
            raise GraftError(
                f"{method} on {self.name!r} {list(self.stored)} with dropout={dropout}",
                "a host that takes the update as a weight, where dropout on the input has no place",
                "set dropout=0 for these sites",
            )

    def parameter(self, rows: int, columns: int, init: Initial) -> nn.Parameter:
        """A new parameter [*batch, rows, columns] on the host's device, of its dtype."""
        return parameter((*self.batch, rows, columns), init, self.like)

    def vector(self, size: int, init: Initial) -> nn.Parameter:
        """A new parameter [*batch, size]."""
        return parameter((*self.batch, size), init, self.like)

    def dense(self, stored: Tensor) -> Tensor:
        """The stored parameter as [*batch, out, in]."""
        whole = self._whole(stored)
        return whole if self.rows is None else whole[self.rows[0] : self.rows[1]]

    def decoded(self, stored: Tensor) -> Tensor:
        """The stored parameter, in numbers where it is held in codes."""
        if self.codes is None or (stored.shape == self.stored and not is_codes(stored)):
            return stored
        return values(self.codes, stored).to(self.like)

    def restore(self, stored: Tensor, dense: Tensor) -> Tensor:
        """The parameter in its stored layout, in numbers, with `dense` in the place of the view."""
        if self.rows is not None:
            whole = self._whole(stored)
            dense = torch.cat([whole[: self.rows[0]], dense.to(stored.dtype), whole[self.rows[1] :]])
        return (dense.mT if self.layout == "transposed" else dense).reshape(self.stored)

    def _whole(self, stored: Tensor) -> Tensor:
        if self.layout == "plain":
            return self.decoded(stored)
        if self.layout == "kernel" or self._deconvolution:
            stored = stored.flatten(1)
        return stored if self.layout == "kernel" else stored.mT

    @property
    def _deconvolution(self) -> bool:
        return len(self.stored) > 2 and not self.batch

    def bias_of(self, stored: Tensor | None) -> Tensor | None:
        """The slice of the host's bias that belongs to the view."""
        return stored if stored is None or self.rows is None else stored[self.rows[0] : self.rows[1]]

    def restore_bias(self, stored: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """The host's bias with `bias` in the place of the view's slice."""
        if self.rows is None or stored is None or bias is None:
            return bias
        return torch.cat([stored[: self.rows[0]], bias.to(stored.dtype), stored[self.rows[1] :]])


NO_WEIGHT = Weight(
    name="", bias=None, shape=(), stored=()
)  # of a host whose parameters are all of other kinds (a class token)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a Linear that stores [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_of(
    module: nn.Module,
    name: str = "weight",
    rows: tuple[int, int] | None = None,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Weight:
    """The dense view of `module`'s parameter `name`. GraftError where there is no such parameter.

    dtype: that of the values of a quantised weight.
    """
    stored = module._parameters.get(name)
    if stored is None:
        raise GraftError(
            f"the weight {name!r} of {type(module).__name__}",
            f"its parameters are {sorted(module._parameters) or 'none'}",
            "choose sites that own a weight",
        )
    layout, linear, lookup = "plain", False, False
    shape: tuple[int, ...]
    if isinstance(module, _ConvTransposeNd):
        layout, shape = "transposed", (math.prod(stored.shape[1:]), stored.shape[0])
    elif isinstance(module, _ConvNd):
        layout, shape = "kernel", (stored.shape[0], math.prod(stored.shape[1:]))
    elif isinstance(module, nn.Embedding):
        layout, lookup, shape = "transposed", True, (stored.shape[1], stored.shape[0])
    elif transposed or (is_conv1d(module) and name == "weight"):
        layout, shape = "transposed", (*stored.shape[:-2], stored.shape[-1], stored.shape[-2])
    else:
        shape = tuple(stored.shape)
    quantised = is_quantised(module, name)
    if quantised:
        shape = (module.out_features, module.in_features)  # type: ignore[assignment]
    if name == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module)):
        linear = True
    held = shape if quantised else tuple(stored.shape)
    if rows is not None:
        shape = (rows[1] - rows[0], shape[-1])
    return Weight(
        name=name,
        bias=_bias_name(module, name),
        shape=tuple(shape),
        stored=held,
        layout=layout,
        rows=rows,
        linear=linear,
        lookup=lookup,
        like=torch.empty(0, dtype=dtype, device=stored.device) if quantised else stored.detach().new_empty(0),
        codes=module if quantised else None,
    )


def _bias_name(module: nn.Module, weight: str) -> str | None:
    """The name of the bias that goes with the weight, whether or not it is there; None where the host has no such slot."""
    names: Callable[[str], bool] = module._parameters.__contains__
    if weight == "weight":
        return "bias" if names("bias") else None
    for candidate in (weight.replace("weight", "bias"), weight + "_bias"):
        if candidate != weight and names(candidate):
            return candidate
    return None
