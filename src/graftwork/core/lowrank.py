"""y = x W^T + b + s drop(x) A^T B^T for a frozen W, at little more than the cost of x W^T.

A thin product is bound by memory: what matters is how often an activation is read, and in which layout the product is
asked for. All [*, r] matrices are therefore held as [r, N] (several times faster on a CPU than [N, r]), results are
added in place into the large product, x is saved once, and no gradient is formed for the frozen weight. Counted in
activations of the input's size that are kept: one (x itself, shared by q, k and v), and with dropout one byte a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .plan import Host


def low_rank(
    x: Tensor,
    base: Callable[[Tensor], Tensor],
    host: Host,
    down: Tensor,
    up: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """base(x) + scale drop(x) down^T up^T.  x [..., in], down [r, in], up [out, r]; dropout: zero in evaluation."""
    if _traced() or not host.frozen_product:
        seen = F.dropout(x, dropout) if dropout else x
        # not in place: the base may be another LowRankProduct, whose output is a view that autograd lets nobody write into
        return torch.add(base(x), F.linear(F.linear(seen, down), up), alpha=scale)
    weight, bias = host.weight, host.bias
    device = x.device.type
    if torch.is_autocast_enabled(device):  # what F.linear would do with each of them
        dtype = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(dtype)
        x, weight, down, up = x.to(dtype), weight.to(dtype), down.to(dtype), up.to(dtype)
        with torch.autocast(device, enabled=False):
            return LowRankProduct.apply(x, weight, bias, down, up, scale, dropout)  # type: ignore[no-any-return]
    if torch.is_grad_enabled():
        return LowRankProduct.apply(x, weight, bias, down, up, scale, dropout)  # type: ignore[no-any-return]
    y = F.linear(x, weight, bias)
    seen = (F.dropout(x, dropout) if dropout else x).reshape(-1, x.shape[-1])
    y.view(-1, y.shape[-1]).addmm_((down @ seen.t()).t(), up.t(), alpha=scale)  # the operations of a training pass
    return y


def _traced() -> bool:
    """Whether the pass is compiled, or transformed by torch.func: then the plain formula is what they work best on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def keep_mask(like: Tensor, dropout: float) -> tuple[Tensor, float]:
    """What dropout keeps (True with probability 1 - dropout), shaped as `like`, and the exact probability of it.

    On a CPU a number costs 16 random bits, not a 53-bit uniform: seven times faster, and the probability is a multiple of
    1 / 65,536, which the returned value accounts for.
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - dropout), 1 - dropout
    n = like.numel()
    words = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:n]
    dropped = min(round(dropout * 65536), 65535)
    return (words >= dropped - 32768).view(like.shape), 1 - dropped / 65536


def dense_is_cheaper(positions: int, d_in: int, d_out: int, r: int) -> bool:
    """Whether a training step costs fewer multiply-adds by W' = W + s B A, made once, than by thin products.

    Thin: N r (in + out) forwards, as much for x backwards, and as much for A and B. Dense: r in out to make W', which then
    serves both directions, and N r (in + out) for A and B at most. W' is kept for the backward pass, so only where the
    update is not thin (more than a tenth of the product itself).
    """
    return 10 * r * (d_in + d_out) > d_in * d_out and d_in * d_out < positions * (d_in + d_out)


class LowRankProduct(torch.autograd.Function):
    """The product, its gradient for x, A and B, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, dropout: float
    ) -> Tensor:
        flat, (d_out, d_in) = x.reshape(-1, x.shape[-1]), weight.shape
        # W' in half precision would round the update away
        ctx.dense = (
            not dropout
            and x.dtype in (torch.float32, torch.float64)
            and dense_is_cheaper(flat.shape[0], d_in, d_out, down.shape[0])
        )
        keep = thin = None
        if ctx.dense:
            weight = torch.addmm(weight, up, down, alpha=scale)
            y = F.linear(x, weight, bias)
        else:
            if dropout:
                keep, share = keep_mask(flat, dropout)
                scale = scale / share
            y = F.linear(x, weight, bias)
            thin = down @ _seen(flat, keep).t()  # [r, N]
            y.view(-1, d_out).addmm_(thin.t(), up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, thin, keep)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, down, up, thin, keep = ctx.saved_tensors
        flat, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        seen = _seen(flat, keep)
        g_x = g_down = g_up = None
        g_thin: Any = None
        if torch.is_grad_enabled() and ctx.dense:  # a gradient of this gradient: W' must be a function of A and B
            weight = weight.detach() - ctx.scale * (up @ down).detach() + ctx.scale * (up @ down)
        if ctx.needs_input_grad[3] or not ctx.dense:
            g_thin = (ctx.scale * up.t()) @ g.t()  # [r, N]
        if ctx.needs_input_grad[0]:
            g_x = g @ weight
            if keep is not None:
                g_x = g_x.addcmul_(g_thin.t().contiguous() @ down, keep)
            elif not ctx.dense:
                g_x = g_x.addmm_(g_thin.t().contiguous(), down)
            g_x = g_x.view(x.shape)
        if ctx.needs_input_grad[3]:
            g_down = g_thin @ seen
        if ctx.needs_input_grad[4]:
            if thin is None or torch.is_grad_enabled():
                thin = down @ seen.t()
            g_up = (ctx.scale * (thin @ g)).t()
        return g_x, None, None, g_down, g_up, None, None


def _seen(flat: Tensor, keep: Tensor | None) -> Tensor:
    """What A sees of x [N, in]."""
    return flat if keep is None else flat * keep
