"""QLoRA: a LoRA over a backbone weight that is held in 4 bits and made again in every pass.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", eq. 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import flag, fraction, number, positive, rank, where
from graftwork.core.initial import kaiming_uniform, normal, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.dropout import drop, traced

from .forms.nf4 import NF4


@method("qlora")
@dataclass(frozen=True)
class QLoRA(Method):
    """W' = Q + s B A,  Q = dequantise(quantise(W)) in NF4,  A [r, in],  B [out, r],  s = alpha / r.  Mergeable, into Q.

    At init (B = 0) the model is the quantised backbone, not the backbone itself. block: numbers for one constant; double_quant:
    these are quantised too, block2 of them for one constant (4.127 bits a weight, 4.5 without).  dropout: on the input of A, in
    training only (the paper: 0.1 up to 13B, 0.05 above).
    Q is made of its codes in each training pass, forwards and backwards, and of W when the adapter is made or loaded: a file is
    that of a LoRA. The backbone's own W stays where it is, so that removing the adapter gives it back to the bit; what that
    costs is 4.127 bits a weight beside it. Where memory is what matters, load the backbone quantised and put a LoRA on it:
    `AutoModel.from_pretrained(name, quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...))`, then `gw.graft(model, "lora")`.
    `gw.quantisation_errors` says what quantising lost, and what it would lose again after a merge.
    Parameters: r (in + out) per weight.  Source: Dettmers et al. 2023, arXiv 2305.14314, section 3; artidoro/qlora.
    When: the backbone does not fit into memory at 16 bits.
    """

    r: int = rank(64)
    alpha: float = number(16.0)
    dropout: float = fraction(0.1)
    block: int = positive(64)
    block2: int = positive(256)
    double_quant: bool = flag(True)
    at: str = where("q, k, v, o, gate, up, down | q, k, v, o, up, down | linear | conv")

    identity = False
    mergeable = True
    lr = 1e-3

    def build(self, site: Site, part: Part) -> Quantised:
        site.weight.require_matrix("qlora", self.dropout)
        return Quantised(self, site)

    def count(self, site: Site) -> int:
        return site.weight.copies * self.r * (site.weight.d_in + site.weight.d_out)


class Quantised(WeightDelta):
    """down = A [*batch, r, in], up = B [*batch, out, r], frozen = W in NF4."""

    lasting = True

    def __init__(self, method: QLoRA, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.down = w.parameter(method.r, w.d_in, zeros if w.lookup else kaiming_uniform())
        self.up = w.parameter(w.d_out, method.r, normal() if w.lookup else zeros)
        self.scale, self.dropout = method.alpha / method.r, method.dropout
        stored = site.module._parameters[w.name]
        assert stored is not None
        self.frozen = NF4(w.dense(stored), method.block, method.block2, method.double_quant)

    def sources(self) -> Iterator[nn.Module]:
        yield from (self, self.frozen)

    def work(self) -> int:
        (*_, r, d_in), d_out = self.down.shape, self.up.shape[-2]
        return r * (d_in + d_out) + d_in * d_out  # the last: Q, once a call

    def weight(self, w: Tensor) -> Tensor:
        return self.frozen.dequantised().to(w.dtype) + self.scale * (self.up @ self.down)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        if traced() or not host.frozen_product:
            w = host.weight
            y = torch.add(base(x), F.linear(x, (self.frozen.dequantised() - w).to(x.dtype)))
        else:
            y = FrozenProduct.apply(x, host.bias, self.frozen)
        seen = drop(x, self.dropout, self.training)
        return torch.add(y, F.linear(F.linear(seen, self.down), self.up), alpha=self.scale)

    def errors(self, w: Tensor) -> tuple[float, float]:
        """|W - Q| / |W|, and |W' - quantise(W')| / |W'|, which a merge loses where its result is to be held in 4 bits again."""
        q = self.frozen
        merged = self.weight(w).float()
        again = NF4(merged, q.block, q.block2, q.twice).dequantised()
        pairs = ((w.float(), q.dequantised()), (merged, again))
        lost, once_more = (float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs)
        return lost, once_more


class FrozenProduct(torch.autograd.Function):
    """x Q^T + b and its gradient for x; Q is made in either direction and not kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, frozen: NF4) -> Tensor:
        ctx.frozen, ctx.dtype = frozen, x.dtype
        return F.linear(x, frozen.dequantised().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (grad @ ctx.frozen.dequantised().to(grad.dtype)).to(ctx.dtype), None, None


@torch.no_grad()
def quantisation_errors(adapter: Any) -> dict[str, tuple[float, float]]:
    """By site, what NF4 loses: (|W - Q| / |W|, |W' - quantise(W')| / |W'|), Frobenius norms; adapter: one that holds a `QLoRA`.

    The first is the price of the frozen weight; a merge writes Q + s B A and loses nothing more. The second is lost if the merged
    weight is quantised again.
    """
    found = {}
    for part in adapter.parts:
        for site in part.sites:
            delta, stored = part.deltas[site.key], site.module._parameters[site.weight.name]
            if isinstance(delta, Quantised) and stored is not None:
                found[site.key] = delta.errors(site.weight.dense(stored))
    return found
