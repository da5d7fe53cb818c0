"""Weights that a backbone holds in few bits: what they stand for, and how a pass runs with them.

Known are bitsandbytes' Linear4bit (nf4, fp4, with double quantisation or without) and Linear8bitLt, and tensors with a
`dequantize` of their own (torchao's). Where their codes and scales lie is known in this file alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import GraftError


def is_codes(t: Tensor) -> bool:
    """Whether a tensor is made of codes: its numbers are not real ones, or those that it shows are not what it holds."""
    return not (t.is_floating_point() or t.is_complex()) or type(t).dequantize is not Tensor.dequantize


def is_quantised(module: nn.Module, name: str) -> bool:
    """Whether the module's parameter `name` is a linear layer's weight and made of codes, whatever their shape."""
    stored = module._parameters.get("weight") if name == "weight" and isinstance(module, nn.Linear) else None
    return stored is not None and (is_codes(stored) or module.__dict__.get("quant_state") is not None)


def activation_dtype(model: nn.Module) -> torch.dtype | None:
    """Of a backbone with quantised weights, the dtype of its first parameter that is none of these; None of any other."""
    codes = {id(m.weight) for m in model.modules() if is_quantised(m, "weight")}
    own = (p.dtype for p in model.parameters() if id(p) not in codes and p.is_floating_point())
    return next(own, None) if codes else None


def values(module: nn.Module, codes: Tensor) -> Tensor:
    """What the codes stand for, [out, in]. GraftError for a layer that does not say how they were made."""
    if type(codes).dequantize is not Tensor.dequantize:
        return codes.dequantize()
    state, scale = _state(module), _row_scale(module)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(*(_rows(codes, state) if _is_interleaved(state) else (codes, state)))
        return found
    if scale is not None:
        return codes * (scale / 127).unsqueeze(1)
    raise GraftError(
        f"the values of a weight of {codes.dtype}",
        f"a {type(module).__name__} that does not say how it was quantised",
        "load the backbone unquantised, or quantised by bitsandbytes or torchao",
    )


def product(module: nn.Module, x: Tensor) -> Tensor:
    """x W^T + b with the module's weight as it reads now, whose values are numbers and no codes; in its dtype, given in x's."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)


def hold_open(module: nn.Module) -> bool:
    """Keep a layer in the form that gradients pass through, until `let_close`; True where it had left it.

    On a CPU with bfloat16 products, Linear4bit lays its codes out anew in its first pass in evaluation, and rounds their scales.
    What it computes from then on has no gradients, and says nothing of it; what adapters below it learn would be zero.
    """
    if not module.__dict__.get(_CLOSES):
        return False
    setattr(module, _CLOSES, False)
    state = _state(module)
    if not _is_interleaved(state):
        return False
    stored = module._parameters["weight"]
    assert stored is not None
    stored.data, opened = _rows(stored.data, state)
    state.__dict__.update(opened.__dict__)
    return True


def let_close(module: nn.Module) -> None:
    """Let the layer go back to its form for inference."""
    setattr(module, _CLOSES, True)


_CLOSES = "support_avx512bf16_for_cpu"


def _state(module: nn.Module) -> Any:
    """How 4-bit codes were made, or None."""
    own = getattr(module._parameters["weight"], "quant_state", None)
    return module.__dict__.get("quant_state") if own is None else own


def _row_scale(module: nn.Module) -> Tensor | None:
    """The largest magnitude of each row of an 8-bit weight; the first pass moves it from the parameter to the layer's state."""
    own = getattr(module._parameters["weight"], "SCB", None)
    return getattr(module.__dict__.get("state"), "SCB", None) if own is None else own


def _is_interleaved(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _rows(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes [out, in / 2] that lie 32 rows together, for inference, and their state, as they were before that.

    Two codes share a byte: there, the first and second half of 64, which are two columns of 32 rows; here, two neighbours in a row.
    The scales stay rounded to bfloat16, and are not quantised a second time.
    """
    rows, pairs = codes.shape
    halves = codes.reshape(-1, 32)
    each = torch.cat([halves & 15, halves >> 4], dim=1).view(rows // 32, pairs, 32, 2).transpose(1, 2).reshape(-1, 2)
    stored = (each[:, 0] << 4 | each[:, 1]).reshape(state.original_qshape)
    state = copy.copy(state)
    state.absmax = state.absmax.t().float().reshape(-1)
    state.dtype, state.nested, state.offset, state.state2 = state.original_dtype, False, None, None
    state.packing_format_for_cpu = False
    return stored.view(getattr(state, "original_storage_type", None) or stored.dtype), state
