"""y = x W^T + b + s drop(x) A^T B^T for a frozen W, at little more than the cost of x W^T.

A thin product is bound by memory: what matters is how often an activation is read, and in which layout the product is
asked for. All [*, r] matrices are therefore held as [r, N] (several times faster on a CPU than [N, r]), results are
added in place into the large product, and no gradient is formed for the frozen weight. Kept for the backward pass: x once
for all sites that read it, or nothing where it can be made again (replay.py), and with dropout one byte a number and draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import drop, keep_mask, traced
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
    draws: tuple[int, ...] = (),
) -> Tensor:
    """base(x) + scale drop(x) down^T up^T.  x [..., in], down [r, in], up [out, r]; dropout: zero in evaluation.

    draws: how many rows of `down` see one draw of the dropout, and how many the next; one draw for all by default.
    """
    if traced() or not host.frozen_product:
        thin = [F.linear(drop(x, dropout), a) for a in down.split(draws or (down.shape[0],))]
        return torch.add(base(x), F.linear(torch.cat(thin, -1), up), alpha=scale)
    weight, bias = host.weight, host.bias
    device = x.device.type
    if torch.is_autocast_enabled(device):  # what F.linear would do with each of them
        dtype = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(dtype)
        x, weight, down, up = x.to(dtype), weight.to(dtype), down.to(dtype), up.to(dtype)
        with torch.autocast(device, enabled=False):
            return _product(x, weight, bias, down, up, scale, dropout, draws, host)
    return _product(x, weight, bias, down, up, scale, dropout, draws, host)


def whole_update(x: Tensor, base: Callable[[Tensor], Tensor], host: Host, update: Tensor) -> Tensor:
    """base(x) + x dW^T for an update dW [out, in] that is not thin: one product with W + dW where the host's own is known."""
    if traced() or not host.frozen_product:
        return torch.add(base(x), F.linear(x, update.to(x.dtype)))
    return F.linear(x, (host.weight + update).to(host.weight.dtype), host.bias)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    dropout: float,
    draws: tuple[int, ...],
    host: Host,
) -> Tensor:
    if dropout or torch.is_grad_enabled():
        shared = input_of(x, host)
        return LowRankProduct.apply(x, weight, bias, down, up, scale, dropout, draws, shared)  # type: ignore[no-any-return]
    flat = x.reshape(-1, x.shape[-1])
    if whole(x.dtype, flat.shape[0], weight.shape[1]):  # as in a training pass
        return F.linear(x, torch.addmm(weight, up, down, alpha=scale), bias)
    y = F.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_((down @ flat.t()).t(), up.t(), alpha=scale)
    return y


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
        draws: tuple[int, ...],
        shared: Input,
    ) -> Tensor:
        flat, (d_out, d_in) = x.reshape(-1, x.shape[-1]), weight.shape
        n, r = flat.shape[0], down.shape[0]
        draws = draws or (r,)
        ctx.kept = not dropout and dense_is_cheaper(x.dtype, n, d_in, d_out, r)
        ctx.whole = not dropout and whole(x.dtype, n, d_out)  # of the gradient of x
        thin, keeps = None, []
        if ctx.kept or (not dropout and whole(x.dtype, n, d_in)):
            dense = torch.addmm(weight, up, down, alpha=scale)
            y = F.linear(flat, dense, bias)
            weight = dense if ctx.kept else weight
        else:
            if dropout:
                drawn = shared.masks(dropout, len(draws), lambda: keep_mask(flat, dropout))
                keeps, scale = [keep for keep, _ in drawn], scale / drawn[0][1]
            y = F.linear(flat, weight, bias)
            thin = _thin(down, flat, keeps, draws)  # [r, N]
            y.addmm_(thin.t(), up.t(), alpha=scale)
        ctx.save_for_backward(shared.keep(x), weight, down, up, thin, *keeps)
        ctx.scale, ctx.shared, ctx.shape, ctx.draws = scale, shared, x.shape, draws
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], d_out))  # not a view: others may add to it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept, weight, down, up, thin, *keeps = ctx.saved_tensors
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
            if keeps:
                for g_part, part, keep in zip(g_thin.split(ctx.draws), down.split(ctx.draws), keeps, strict=True):
                    for p in _pieces(g_x):
                        g_x[p].addcmul_(g_part[:, p].t().contiguous() @ part, keep[p])
            elif thinly:
                g_x = g_x.addmm_(g_thin.t().contiguous(), down)
            g_x = g_x.view(ctx.shape)
        again = thin is None or torch.is_grad_enabled()
        if ctx.needs_input_grad[3] or (ctx.needs_input_grad[4] and again):
            flat = shared.again(kept).reshape(-1, down.shape[1])
        if ctx.needs_input_grad[3]:
            parts = zip(g_thin.split(ctx.draws), keeps, strict=False)
            drawn = [_sum(g_part[:, p] @ (flat[p] * keep[p]) for p in _pieces(flat)) for g_part, keep in parts]
            g_down = torch.cat(drawn) if drawn else g_thin @ flat
        if ctx.needs_input_grad[4]:
            if again:
                same = (down.data_ptr(), down.shape, down._version)  # VeRA: one frozen A for q, k and v
                common = not keeps and not ctx.needs_input_grad[3]
                thin = shared.once(same, lambda: down @ flat.t()) if common else _thin(down, flat, keeps, ctx.draws)
            g_up = (ctx.scale * (thin @ g)).t()
        shared.done()
        return g_x, None, None, g_down, g_up, None, None, None, None


def _thin(down: Tensor, flat: Tensor, keeps: list[Tensor], draws: tuple[int, ...]) -> Tensor:
    """A drop(x)^T [r, N], of the rows of A in turn as many as `draws` says with each mask."""
    if not keeps:
        return down @ flat.t()
    parts = zip(down.split(draws), keeps, strict=True)
    return torch.cat([torch.cat([a @ (flat[p] * keep[p]).t() for p in _pieces(flat)], dim=1) for a, keep in parts])


def _pieces(flat: Tensor) -> list[slice]:
    """Rows of [N, d] that are taken at a time: on a CPU what stays in its cache between two operations on it."""
    n, d = flat.shape
    rows = max(1, 2**18 // d) if flat.device.type == "cpu" and not torch.is_grad_enabled() else max(n, 1)
    return [slice(i, min(i + rows, n)) for i in range(0, max(n, 1), rows)]


def _sum(terms: Iterator[Tensor]) -> Tensor:
    return reduce(Tensor.add_, terms)
