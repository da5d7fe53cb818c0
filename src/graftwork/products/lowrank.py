"""y = x W^T + b + s drop(x) A^T B^T for a frozen W, at little more than the cost of x W^T.

A thin product is bound by memory: what matters is how often an activation is read, and in which layout the product is
asked for. All [*, r] matrices are therefore held as [r, N] (several times faster on a CPU than [N, r]), results are
added in place into the large product, and no gradient is formed for the frozen weight. Kept for the backward pass: x once
for all sites that read it, or nothing where it can be made again (replay.py), and with dropout one byte a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Input, input_of

if TYPE_CHECKING:
    from ..core.plan import Host


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
    if traced() or not host.frozen_product:
        seen = F.dropout(x, dropout) if dropout else x
        return torch.add(base(x), F.linear(F.linear(seen, down), up), alpha=scale)
    weight, bias = host.weight, host.bias
    device = x.device.type
    if torch.is_autocast_enabled(device):  # what F.linear would do with each of them
        dtype = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(dtype)
        x, weight, down, up = x.to(dtype), weight.to(dtype), down.to(dtype), up.to(dtype)
        with torch.autocast(device, enabled=False):
            return _product(x, weight, bias, down, up, scale, dropout, host)
    return _product(x, weight, bias, down, up, scale, dropout, host)


def whole_update(x: Tensor, base: Callable[[Tensor], Tensor], host: Host, update: Tensor) -> Tensor:
    """base(x) + x dW^T for an update dW [out, in] that is not thin: one product with W + dW where the host's own is known."""
    if traced() or not host.frozen_product:
        return torch.add(base(x), F.linear(x, update.to(x.dtype)))
    return F.linear(x, (host.weight + update).to(host.weight.dtype), host.bias)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, dropout: float, host: Host
) -> Tensor:
    if dropout or torch.is_grad_enabled():
        shared = input_of(x, host)
        return LowRankProduct.apply(x, weight, bias, down, up, scale, dropout, shared)  # type: ignore[no-any-return]
    flat = x.reshape(-1, x.shape[-1])
    if whole(x.dtype, flat.shape[0], weight.shape[1]):  # as in a training pass
        return F.linear(x, torch.addmm(weight, up, down, alpha=scale), bias)
    y = F.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_((down @ flat.t()).t(), up.t(), alpha=scale)
    return y


def traced() -> bool:
    """Whether the pass is compiled, or transformed by torch.func: then the plain formula is what they work best on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def keep_mask(like: Tensor, dropout: float) -> tuple[Tensor, float]:
    """What dropout keeps (1 with probability 1 - dropout, else 0), shaped as `like`, and the exact probability of it.

    On a CPU a number costs 16 random bits, not a 53-bit uniform: ten times faster, and the probability is a multiple of
    1 / 65,536, which the returned value accounts for.
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - dropout), 1 - dropout
    n = like.numel()
    seed = int(torch.empty((), dtype=torch.int64).random_())
    raw = np.random.SFC64(seed).random_raw((n + 3) // 4)  # twice as fast as torch's own generator
    words = torch.from_numpy(raw).view(torch.int16)[:n]
    dropped = min(max(round(dropout * 65536), 1), 65535)
    least = dropped - 32768  # of the words that keep
    keep = (
        words.clamp_(least - 1, least).sub_(least - 1).to(torch.uint8)
    )  # comparisons and bool are several times slower
    return keep.view(like.shape), 1 - dropped / 65536


def whole(dtype: torch.dtype, positions: int, width: int) -> bool:
    """Whether W' = W + s B A is made for one product with N positions: it moves fewer numbers than adding to the product.

    width: the other axis of W' beside the one it shares with the product (in for y, out for the gradient of x), so that
    W' has width / N of the product's size, and costs up to half more for each number. Never in half precision, which
    would round the update away.
    """
    return dtype in (torch.float32, torch.float64) and 3 * width < 2 * positions


def dense_is_cheaper(dtype: torch.dtype, positions: int, d_in: int, d_out: int, r: int) -> bool:
    """Whether a training step makes W' = W + s B A once and keeps it, counted in multiply-adds.

    Thin: N r (in + out) forwards, as much for x backwards, and as much for A and B. Dense: r in out to make W', which then
    serves both directions, and N r (in + out) for A and B at most. W' is kept for the backward pass, so only where the
    update is not thin (more than a tenth of the product itself).
    """
    real = dtype in (torch.float32, torch.float64)
    return real and 10 * r * (d_in + d_out) > d_in * d_out and d_in * d_out < positions * (d_in + d_out)


class LowRankProduct(torch.autograd.Function):
    """The product, its gradient for x, A and B, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dropout: float,
        shared: Input,
    ) -> Tensor:
        flat, (d_out, d_in) = x.reshape(-1, x.shape[-1]), weight.shape
        n, r = flat.shape[0], down.shape[0]
        ctx.kept = not dropout and dense_is_cheaper(x.dtype, n, d_in, d_out, r)
        ctx.whole = not dropout and whole(x.dtype, n, d_out)  # of the gradient of x
        keep = thin = None
        if ctx.kept or (not dropout and whole(x.dtype, n, d_in)):
            dense = torch.addmm(weight, up, down, alpha=scale)
            y = F.linear(flat, dense, bias)
            weight = dense if ctx.kept else weight
        else:
            if dropout:
                keep, share = shared.mask(dropout, lambda: keep_mask(flat, dropout))
                scale = scale / share
            y = F.linear(flat, weight, bias)
            thin = _thin(down, flat, keep)  # [r, N]
            y.addmm_(thin.t(), up.t(), alpha=scale)
        ctx.save_for_backward(shared.keep(x), weight, down, up, thin, keep)
        ctx.scale, ctx.shared, ctx.shape = scale, shared, x.shape
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], d_out))  # not a view: others may add to it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, weight, down, up, thin, keep = ctx.saved_tensors
        shared, g = ctx.shared, grad.reshape(-1, grad.shape[-1])
        g_x = g_down = g_up = None
        g_thin: Any = None
        if ctx.kept and torch.is_grad_enabled():  # a gradient of this gradient: W' must be a function of A and B
            weight = weight.detach() - ctx.scale * (up @ down).detach() + ctx.scale * (up @ down)
        thinly = not (ctx.kept or ctx.whole)
        if ctx.needs_input_grad[3] or (ctx.needs_input_grad[0] and thinly):
            g_thin = (ctx.scale * up.t()) @ g.t()  # [r, N]
        if ctx.needs_input_grad[0]:
            g_x = g @ (torch.addmm(weight, up, down, alpha=ctx.scale) if ctx.whole and not ctx.kept else weight)
            if keep is not None:
                for rows in _pieces(g_x):
                    g_x[rows].addcmul_(g_thin[:, rows].t().contiguous() @ down, keep[rows])
            elif thinly:
                g_x = g_x.addmm_(g_thin.t().contiguous(), down)
            g_x = g_x.view(ctx.shape)
        again = thin is None or torch.is_grad_enabled()
        if ctx.needs_input_grad[3] or (ctx.needs_input_grad[4] and again):
            flat = shared.again(kept).reshape(-1, down.shape[1])
        if ctx.needs_input_grad[3]:
            g_down = g_thin @ flat if keep is None else _sum(g_thin[:, p] @ (flat[p] * keep[p]) for p in _pieces(flat))
        if ctx.needs_input_grad[4]:
            if again:
                same = (down.data_ptr(), down.shape, down._version)  # VeRA: one frozen A for q, k and v
                common = keep is None and not ctx.needs_input_grad[3]
                thin = shared.once(same, lambda: down @ flat.t()) if common else _thin(down, flat, keep)
            g_up = (ctx.scale * (thin @ g)).t()
        shared.done()
        return g_x, None, None, g_down, g_up, None, None, None


def _thin(down: Tensor, flat: Tensor, keep: Tensor | None) -> Tensor:
    """A drop(x)^T [r, N]."""
    if keep is None:
        return down @ flat.t()
    return torch.cat([down @ (flat[p] * keep[p]).t() for p in _pieces(flat)], dim=1)


def _pieces(flat: Tensor) -> list[slice]:
    """Rows of [N, d] that are taken at a time: on a CPU what stays in its cache between two operations on it."""
    n, d = flat.shape
    rows = max(1, 2**18 // d) if flat.device.type == "cpu" and not torch.is_grad_enabled() else max(n, 1)
    return [slice(i, min(i + rows, n)) for i in range(0, max(n, 1), rows)]


def _sum(terms: Iterator[Tensor]) -> Tensor:
    return reduce(Tensor.add_, terms)
