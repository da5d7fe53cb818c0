"""NeuroAda: every output neuron gets a few trained increments, at the places of its largest pretrained weights.

Zhang et al. 2025, "NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient Fine-Tuning", section 3; the form that
gathers columns of x in the place of a dense gradient is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, positive, where
from graftwork.core.initial import tensor, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.lowrank import whole_update

from .forms.partial import partial_update


@method("neuroada")
@dataclass(frozen=True)
class NeuroAda(Method):
    """W'[o, i_oj] = W[o, i_oj] + v_oj,  j = 1 ... k,  i_o the k places of row o with the largest |W|.  Identity at init (v = 0).

    Mergeable. k: increments of a neuron, at most its number of inputs.  select: "magnitude" as above; "smallest" |W|; "random";
    "gradient", the largest |dL/dW| over the batches of gw.calibrate.  The places are stored with the values.
    Parameters: k out per weight.  Source: Zhang et al. 2025; FightingFighting/NeuroAda.
    When: every neuron shall keep a few trainable inputs (so that none is out of reach), with the merge exact and the optimiser's
        state small.
    """

    k: int = positive(1)
    select: str = choice("magnitude", "magnitude", "smallest", "random", "gradient")
    at: str = where("q, k, v, o, gate, up, down | q, k, v, o, up, down | linear | conv")

    mergeable = True
    lr = 5e-3

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Data, where the places come from gradients."""
        return ("calibrate",) if self.select == "gradient" else ()

    def build(self, site: Site, part: Part) -> Increments:
        site.weight.require_matrix("neuroada")
        return Increments(self, site)

    def count(self, site: Site) -> int:
        return site.weight.copies * site.weight.d_out * min(self.k, site.weight.d_in)

    def calibrating(self, part: Part) -> None:
        for delta in _increments(part):
            delta.probe = (torch.zeros(delta.view.shape, dtype=delta.values.dtype, device=delta.values.device),)
            delta.probe[0].requires_grad_(True)

    def calibrated(self, part: Part) -> None:
        for delta in _increments(part):
            (probe,) = delta.probe
            if probe.grad is None:
                found = "no gradient reached its weight in the calibration batches"
                raise GraftError(f"{self} at {delta.key}", found, "choose sites that the loss depends on")
            delta.index.copy_(probe.grad.float().abs().topk(delta.index.shape[-1]).indices)
            delta.probe, delta.decided = (), True


def _increments(part: Part) -> list[Increments]:
    return [d for d in part.deltas.values() if isinstance(d, Increments)]


def _kind(n: int) -> torch.dtype:
    """The smallest whole numbers that count n places."""
    return torch.uint8 if n <= 2**8 else torch.int16 if n <= 2**15 else torch.int32


class Increments(WeightDelta):
    """values = v [*batch, out, k], index = i [*batch, out, k], of the smallest whole numbers that hold it."""

    index: Tensor
    lasting = True

    def __init__(self, method: NeuroAda, site: Site) -> None:
        super().__init__()
        w, k = site.weight, min(method.k, site.weight.d_in)
        stored = site.module._parameters[w.name]
        assert stored is not None

        def chosen(t: Tensor, generator: torch.Generator | None) -> None:
            if method.select == "random":
                score = torch.rand(w.shape, generator=generator)
            else:
                score = w.dense(stored.detach()).float().abs()
            t.copy_(score.topk(k, largest=method.select != "smallest").indices)

        # drawn as real numbers, of which float64 holds every index
        index = tensor((*w.batch, w.d_out, k), chosen, torch.empty(0, dtype=torch.float64, device=stored.device))
        self.values = w.parameter(w.d_out, k, zeros)
        self.register_buffer("index", index.to(_kind(w.d_in)))
        self.probe: tuple[Tensor, ...] = ()
        self.decided = method.select != "gradient"

    def update(self) -> Tensor:
        if self.probe:
            return self.probe[0]
        self.check_decided()
        zero = torch.zeros(self.view.shape, dtype=self.values.dtype, device=self.values.device)
        return self.into(zero, self.values)

    def check_decided(self) -> None:
        """GraftError where it is trained before its places are known."""
        if not self.decided and self.training and torch.is_grad_enabled():
            raise GraftError(
                "train neuroada(select='gradient')", "its places are not known yet", "call gw.calibrate first"
            )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        self.decided = True

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        if self.probe:
            return whole_update(x, base, host, self.probe[0])
        self.check_decided()
        return partial_update(x, base, host, self.values, self)

    def into(self, w: Tensor, values: Tensor) -> Tensor:
        return w.scatter_add(-1, self.index.long(), values)

    def seen(self, x: Tensor) -> Tensor:
        return x

    def gradient(self, g: Tensor, seen: Tensor) -> Tensor:
        """dL/dv[o, j] = sum_n g[n, o] x[n, i_oj]: k N out multiply-adds, row by row of the transposed x."""
        g, x, index = g.t().contiguous(), seen.t().contiguous(), self.index.int()
        return torch.stack([(g * x.index_select(0, column)).sum(-1) for column in index.unbind(-1)], -1)
