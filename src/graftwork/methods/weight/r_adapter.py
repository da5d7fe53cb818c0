"""R-Adapter: linear adapters behind attention and feed-forward, kept robust by three ensembles of themselves.

Kim et al. 2024, "Efficient and Versatile Robust Fine-Tuning of Zero-shot Models", arXiv 2408.05749, section 4.1. Its loss is
`graftwork.objectives.mpm_nce`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import fraction, positive, where
from graftwork.core.initial import kaiming_uniform, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site


@method("r_adapter")
@dataclass(frozen=True)
class RAdapter(Method):
    """y' = y + M y for the output y of the site, M [out, out].  W' = (I + M) W, b' = (I + M) b.  Identity at init (M = 0); mergeable.

    r: M is any matrix (None), or M = B A, A [r, out] kaiming-uniform (a = sqrt 5), B [out, r] zero (few shots).
    p: dropping: in training y' = y + g / (1 - p) M y, g ~ Bernoulli(1 - p) drawn by each adapter in each pass of the model.
    momentum: accumulation: E <- m E + (1 - m) M after each gw.step, E = 0 at first, and E stands for M outside of training;
        before the first step, M itself. 0: no E. The file holds E as the M of an adapter without one, a whole matrix whatever r;
        gw.save(..., resume=True) all that training needs.
    Rescaling needs no word of its own: gw.activate(model, "0.5*a") is (I + 0.5 E) W, half way between W and W', bias included;
        published factors: 0.5 for classification, 0.8 for retrieval, 0.4 for segmentation.
    When: a zero-shot model (CLIP) is tuned on one data set and must stay good on others.
    Parameters per site: out^2, or 2 r out.  Source: Kim et al. 2024, eq. 4 to 8.
    """

    r: int | None = positive(None)
    p: float = fraction(0.2)
    momentum: float = fraction(0.999)
    at: str = where("o, down | linear | conv")

    mergeable = True

    @property
    def lr(self) -> float:  # type: ignore[override]
        """A whole matrix on frozen outputs needs a lower one: tried on SST-2, where a tenth learns and the common rate diverges."""
        return Method.lr / 10 if self.r is None else Method.lr

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Steps for E, passes for g."""
        return (*(("step",) if self.momentum else ()), *(("begin",) if self.p else ()))

    def build(self, site: Site, part: Part) -> Multiplier:
        site.weight.require_matrix("r_adapter")
        return Multiplier(self, site)

    def count(self, site: Site) -> int:
        w = site.weight
        return w.copies * w.d_out * (w.d_out if self.r is None else 2 * self.r)

    def begin(self, part: Part) -> None:
        for delta in part.deltas.values():
            if isinstance(delta, Multiplier):
                delta.draw()

    def step(self, part: Part, progress: float) -> None:
        for delta in part.deltas.values():
            if isinstance(delta, Multiplier) and self.momentum and delta.up.requires_grad:
                delta.accumulate()
        self.begin(part)  # a compiled pass does not ask

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """What acts outside of training: E, or M where nothing is accumulated."""
        deltas = {key: d for key, d in part.deltas.items() if isinstance(d, Multiplier)}
        averaged = all(d.averaged for d in deltas.values())
        tensors = {
            key: {"up": d.mean.to(d.up.dtype)} if averaged else {n: p.detach() for n, p in d.named_parameters()}
            for key, d in deltas.items()
        }
        return replace(self, r=None if averaged else self.r, momentum=0.0), tensors, {}


class Multiplier(WeightDelta):
    """up = M [*batch, out, out], or up = B [*batch, out, r] and down = A [*batch, r, out].

    mean = E [*batch, out, out], in float32: with a momentum near 1 a step is too small for less.  kept: g / (1 - p).
    """

    lasting = True
    mean: Tensor
    steps: Tensor

    def __init__(self, method: RAdapter, site: Site) -> None:
        super().__init__()
        w, d = site.weight, site.weight.d_out
        self.down = None if method.r is None else w.parameter(method.r, d, kaiming_uniform())
        self.up = w.parameter(d, method.r or d, zeros)
        self.p, self.momentum = method.p, method.momentum
        self.kept, self.averaged = 1.0, False
        if method.momentum:
            self.register_buffer("mean", self.up.detach().new_zeros((*w.batch, d, d), dtype=torch.float32))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long, device="cpu"))

    def pair(self) -> tuple[Tensor, Tensor | None]:
        """M, or (B, A), as they act now."""
        learning = self.training and self.runtime.open
        if self.averaged and not learning:
            return self.mean.to(self.up.dtype), None
        return (self.up * self.kept if learning and self.kept != 1 else self.up), self.down

    def weight(self, w: Tensor) -> Tensor:
        up, down = self.pair()
        return w + up @ (w if down is None else down @ w)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None else self.weight(b[..., None])[..., 0]

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y, (up, down) = base(x), self.pair()
        return y + F.linear(y if down is None else F.linear(y, down), up)

    def work(self) -> int:
        return self.view.copies * self.view.d_out**2

    def draw(self) -> None:
        """g of this pass."""
        if self.p:
            self.kept = float(torch.rand(()) >= self.p) / (1 - self.p)

    @torch.no_grad()
    def accumulate(self) -> None:
        """E of this step."""
        m = self.up if self.down is None else self.up @ self.down
        self.mean.lerp_(m.to(self.mean.dtype), 1 - self.momentum)
        self.steps += 1
        self.averaged = True

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        self.averaged = bool(self.momentum and self.steps)
