"""Operations that keep a few bits for the backward pass instead of their input: forward values are exact, gradients are not.

S2A 2025, "A Unified Framework for Parameter and Memory Efficient Transfer Learning". Of y = f(x) the backward pass needs
f'(x) alone: it is kept as uniform codes over its range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .codes import Codes, pack, unpack
from .slopes import SLOPES


class _Pointwise(torch.autograd.Function):
    """dx = f'(x) dy, from the codes of f'(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, bits: int) -> Tensor:
        slope = SLOPES[name]
        ctx.bits = 1 if name == "relu" else bits
        packed, *rest = pack(slope.derivative(x.float()), ctx.bits, slope.low, slope.high)
        ctx.save_for_backward(packed)
        ctx.rest = rest
        return slope.value(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return dy * unpack(Codes(*ctx.saved_tensors, *ctx.rest), ctx.bits, dy.dtype), None, None


class _Softmax(torch.autograd.Function):
    """dx = y (dy - <dy, y>), from the codes of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, bits: int) -> Tensor:
        y = F.softmax(x, dim)
        packed, *rest = pack(y, bits, 0.0, y.max())
        ctx.save_for_backward(packed)
        ctx.rest, ctx.dim, ctx.bits = rest, dim, bits
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        y = unpack(Codes(*ctx.saved_tensors, *ctx.rest), ctx.bits, dy.dtype)
        return y * (dy - (dy * y).sum(ctx.dim, keepdim=True)), None, None


class _LayerNorm(torch.autograd.Function):
    """dx = (g dy - mean(g dy) - z mean(g dy z)) / sigma, from the codes of z = (x - mean) / sigma and the exact 1 / sigma."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, bits: int) -> Tensor:
        inverse = torch.rsqrt(x.float().var(-1, correction=0, keepdim=True) + eps)
        z = (x.float() - x.float().mean(-1, keepdim=True)) * inverse
        packed, *rest = pack(z, bits, z.min(), z.max())
        ctx.save_for_backward(packed, inverse, weight)
        ctx.rest, ctx.bits = rest, bits
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        packed, inverse, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            z = unpack(Codes(packed, *ctx.rest), ctx.bits, dy.dtype)
            g = dy if weight is None else dy * weight
            dx = (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True)) * inverse.to(dy.dtype)
            dw = (dy * z).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[2]:
            db = dy.flatten(0, -2).sum(0)
        return dx, dw, db, None, None


class Packing(TorchFunctionMode):
    """While it holds, GELU, SiLU, ReLU, softmax and layer norm keep codes of `bits` bits for the backward pass."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = KEPT.get(func)
        if made is None or not args or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return func(*args, **kwargs)
        out = made(self.bits, *args, **kwargs)
        return func(*args, **kwargs) if out is None else out


def _unary(name: str) -> Callable[..., Tensor | None]:
    def run(bits: int, x: Tensor, inplace: bool = False, approximate: str = "none") -> Tensor | None:
        return None if inplace else _Pointwise.apply(x, name if approximate == "none" else f"{name}_tanh", bits)  # type: ignore[no-untyped-call, no-any-return]

    return run


def _softmax(bits: int, x: Tensor, dim: int | None = None, *rest: Any, dtype: Any = None, **more: Any) -> Tensor | None:
    if dim is None or rest or more:
        return None
    return _Softmax.apply(x if dtype is None else x.to(dtype), dim, bits)  # type: ignore[no-untyped-call, no-any-return]


def _layer_norm(
    bits: int, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    return _LayerNorm.apply(x, weight, bias, eps, bits) if len(shape) == 1 else None  # type: ignore[no-untyped-call, no-any-return]


KEPT: dict[Any, Callable[..., Tensor | None]] = {
    F.gelu: _unary("gelu"), F.silu: _unary("silu"), F.relu: _unary("relu"), torch.relu: _unary("relu"),
    F.softmax: _softmax, torch.softmax: _softmax, Tensor.softmax: _softmax, F.layer_norm: _layer_norm,
}  # fmt: skip
