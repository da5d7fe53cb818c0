"""Batch norms of an adapter's own: gains, shifts and running statistics, one set for each domain.

Rebuffi, Bilen and Vedaldi 2017, "Learning multiple visual domains with residual adapters".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, number, where
from graftwork.core.initial import ones, parameter, tensor, values, zeros
from graftwork.core.method import Method, method
from graftwork.core.passes import Runtime
from graftwork.core.site import Site


@method("batch_norm")
@dataclass(frozen=True)
class BatchNorm(Method):
    """y = g (x - m) / sqrt(v + eps) + c,  m, v [d] those of the batch in training, running ones in evaluation.

    Everything starts at the backbone's values, the running statistics too, so that it is the identity at init in
    evaluation; the backbone's own stay as they are. In evaluation it is a change of the backbone's gain and shift under
    its own statistics (G = g sqrt(V + eps) / sqrt(v + eps), C = c + (M - m) g / sqrt(v + eps)), and merges as such.
    statistics: "batch" as above; "running" normalises by the running ones in training too, and leaves them alone.
    momentum: m <- (1 - momentum) m + momentum m_batch, and v likewise.
    Parameters: 2 d per norm (and 2 d statistics).  Source: Rebuffi et al. 2017, section 3 (domain-specific
        normalisation); srebuffi/residual_adapters.
    When: images of another domain shift the statistics of a convolutional backbone; alone, the cheapest adaptation.
    """

    statistics: str = choice("batch", "batch", "running")
    momentum: float = number(0.1, low=0.0, high=1.0)
    at: str = where("norm")

    mergeable = True

    def build(self, site: Site, part: Part) -> OwnNorm:
        host = site.module
        if not isinstance(host, _BatchNorm) or not host.affine or not host.track_running_stats:
            kept = "without gains or running statistics" if isinstance(host, _BatchNorm) else "no batch norm"
            do = "choose batch norms, e.g. at='/normalization/', or ln_tuning for other norms"
            raise GraftError(f"{self} at {site.key}", f"{type(host).__name__}, {kept}", do)
        return OwnNorm(self, host)

    def count(self, site: Site) -> int:
        return 2 * site.weight.d_out


class Normaliser(nn.Module):
    """weight = g, bias = c, mean = m, var = v, all [d]; those of `source` where there is one."""

    def __init__(self, d: int, like: Tensor, momentum: float, source: _BatchNorm | None = None) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, 1e-5 if source is None else source.eps
        first: tuple[Tensor | None, ...] = (None,) * 4
        if source is not None:
            first = source.weight, source.bias, source.running_mean, source.running_var
        g, c, m, v = (
            rest if t is None else values(t) for t, rest in zip(first, (ones, zeros, zeros, ones), strict=True)
        )
        self.weight, self.bias = parameter((d,), g, like), parameter((d,), c, like)
        self.register_buffer("mean", tensor((d,), m, like))
        self.register_buffer("var", tensor((d,), v, like))

    mean: Tensor
    var: Tensor

    def deviation(self) -> Tensor:
        """sqrt(v + eps) [d]."""
        return torch.sqrt(self.var + self.eps)

    def by_batch(self, x: Tensor, runtime: Runtime) -> Tensor:
        """x [batch, d, *space] normalised by its own statistics, which the running ones follow."""
        if runtime.rows is not None:
            do = "call model.eval(), or train one adapter at a time"
            raise GraftError("train with one adapter per row", "batch statistics are of one adapter's batch", do)
        mean, var = self.mean.clone(), self.var.clone()
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        if runtime.running:  # a block that gradient checkpointing runs again has been counted
            with torch.no_grad():  # by copy_, which counts as a write: what was made of the old ones is made again
                self.mean.copy_(mean)
                self.var.copy_(var)
        return y


class OwnNorm(WeightDelta):
    """norm: g, c, m and v."""

    def __init__(self, method: BatchNorm, host: _BatchNorm) -> None:
        super().__init__()
        self.norm = Normaliser(host.num_features, host.weight, method.momentum, host)
        self.by_batch = method.statistics == "batch"
        self._host = (host,)  # in a tuple: it is the backbone's, not a part of the delta

    def names(self) -> tuple[str, ...]:
        return "weight", "bias"

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        if self.training and self.by_batch:
            return stored  # `forward` computes from x
        host, own = self._host[0], self.norm
        assert host.running_mean is not None and host.running_var is not None
        if name == "weight":
            return own.weight * (torch.sqrt(host.running_var + host.eps) / own.deviation())
        return own.bias + (host.running_mean - own.mean) * (own.weight / own.deviation())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            return y
        return self.norm.by_batch(x.movedim(-1, 1), self.runtime).movedim(1, -1)

    def overrides(self, function: str) -> bool:
        return self.by_batch if function == "forward" else super().overrides(function)
