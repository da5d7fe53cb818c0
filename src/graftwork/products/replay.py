"""Activations that need not be kept: the backward pass can make them again from what autograd keeps anyway.

A thin product needs its input x for the gradient of A. In a frozen backbone nobody else does: the norm before q, k, v
keeps its own input, the gated product before `down` keeps both its factors. So where x came out of one cheap operation
whose arguments are kept whatever we do, x is not kept; the operation is run again, bit for bit for products and
activations, to the last digit for layer norms. Read from the autograd graph (its documented `_saved_*`), so that no host
is known here.

Not seen, as nowhere in autograd: a write through `.data` between that operation and its use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Recipe = Callable[[], Tensor]


def recipe(x: Tensor) -> Recipe | None:
    """What makes x again in the backward pass; None where x itself must be kept.

    Also None where somebody else decides what is kept (checkpointing, offloading: hooks on saved tensors), or where x was
    written to in place.
    """
    if version(x) or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    return _of(x.grad_fn, steps=3)


def version(x: Tensor) -> int:
    """How often x was written to in place; a tensor of inference mode does not count."""
    return 0 if x.is_inference() else x._version


def _of(node: Any, steps: int) -> Recipe | None:
    make = MAKERS.get(node.name()) if node is not None and steps else None
    return None if make is None else make(node, steps - 1)


def _operand(node: Any, name: str, index: int, steps: int) -> Recipe | None:
    """An argument of the node: kept by it, or made again in its turn."""
    if getattr(node, name) is not None:
        return lambda: getattr(node, name)  # type: ignore[no-any-return]
    return _of(node.next_functions[index][0], steps)


def _product(node: Any, steps: int) -> Recipe | None:
    left, right = _operand(node, "_saved_self", 0, steps), _operand(node, "_saved_other", 1, steps)
    return None if left is None or right is None else lambda: left() * right()


def _cast(node: Any, steps: int) -> Recipe | None:
    before, to = _of(node.next_functions[0][0], steps), node._input_metadata[0]
    return None if before is None else lambda: before().to(to.device, to.dtype)


def _layer_norm(node: Any, steps: int) -> Recipe:
    def make() -> Tensor:
        x, mean, spread = node._saved_input, node._saved_result1, node._saved_result2
        if torch.is_grad_enabled():  # for a gradient of the gradient they must be functions of x; epsilon is in neither
            axes = tuple(range(-len(node._saved_normalized_shape), 0))
            mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
            spread = (variance + (spread**-2 - variance).detach()).rsqrt()
        out = (x - mean) * spread
        weight, bias = node._saved_weight, node._saved_bias
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    return make


MAKERS: dict[str, Callable[[Any, int], Recipe | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": lambda node, _: lambda: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node, _: lambda: F.silu(node._saved_self),
}
