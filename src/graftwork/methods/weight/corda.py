"""CorDA: a low-rank pair that starts at the part of W that its inputs, in a few samples, ask for most, or least.

Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", eq. 1 to 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, fraction, number, positive, where
from graftwork.core.initial import zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.residual import Residual, joined, require_rank
from .forms.starts import Pair, shared_out, weight_at
from .lora import LoRA

CLOSE = 0.05  # |C C^-1 - I| (Frobenius) of an inverse that is good enough


@method("corda")
@dataclass(frozen=True)
class CorDA(Method):
    """W' = W + s (B A - B_0 A_0),  s = alpha / r,  B_0 A_0 from U S V = SVD(W C),  C [in, in] the covariance of the inputs.

    C = (1/n) sum over n samples x [tokens, in] of x^T x, x divided by max |x| of its sample (the published code divides by
    |max x|, which may be nearly zero, and takes a batch for one sample), then C + damp mean(diag C) I, with damp doubled
    until its inverse is good. W = U S V C^-1, of which r triples are taken: B_0 = U sqrt(S / s), A_0 = sqrt(S / s) V C^-1.
    mode: "ipm" (instruction-previewed) the r largest, for samples of the task that is learned; "kpm" (knowledge-preserved)
        the r smallest, for samples of the knowledge to be kept (questions of NQ-open, TriviaQA).
    gw.calibrate decides, before the optimiser is made; n ~ 128 in / tokens per sample (256 samples of 2,048 for in = 4,096).
    dropout: on the input of A, in training only. W is never rewritten: a file holds the plain LoRA [B, -B_0][A; A_0] of
    rank 2 r, and with resume=True what training needs. Only linear layers, whose inputs are seen. Mergeable.
    Parameters: r (in + out) per weight.  Source: Yang et al. 2024, arXiv 2406.05223, and iboing/CorDA.
    When: samples of the task (ipm) or of knowledge to be kept (kpm) are at hand before training; starts faster than LoRA, and
        loses less with kpm.
    """

    r: int = positive(128)
    alpha: float = number(128.0, low=1e-6)
    mode: str = choice("ipm", "ipm", "kpm")
    damp: float = number(0.01, low=0.0)
    dropout: float = fraction(0.0)
    at: str = where("q, v | linear")

    mergeable = True
    needs = ("calibrate",)

    def build(self, site: Site, part: Part) -> Residual:
        w = site.weight
        w.require_matrix("corda", self.dropout)
        if not w.linear:
            found = f"{type(site.module).__name__}.{w.name}, whose inputs are not seen"
            raise GraftError(f"{self} at {site.key}", found, "choose linear layers")
        require_rank(self, w, self.r, site.key)
        made = Residual(w, self.r, self.alpha / self.r, self.dropout, zeros, zeros)
        made.settled = False
        return made

    def count(self, site: Site) -> int:
        return self.r * (site.weight.d_in + site.weight.d_out)

    def calibrating(self, part: Part) -> None:
        for delta in part.deltas.values():
            assert isinstance(delta, Residual)
            delta.seen = Covariance()

    @torch.no_grad()
    def calibrated(self, part: Part) -> None:
        seen = {key: d.seen for key, d in part.deltas.items() if isinstance(d, Residual)}
        pairs = {}
        for site in part.sites:
            inputs = seen[site.key]
            assert isinstance(inputs, Covariance)
            if inputs.total is None:
                do = "calibrate with batches that reach every site, or choose other sites"
                raise GraftError(f"calibrate {self}", f"no input reached {site.key}", do)
            pairs[site.key] = self.pair(weight_at(site), inputs.total / inputs.samples)
        for key, delta in part.deltas.items():
            assert isinstance(delta, Residual)
            delta.seen = None
            delta.settle(*pairs[key])

    def pair(self, w: Tensor, c: Tensor) -> Pair:
        """(A_0, B_0) of a weight [out, in] and the covariance of its inputs [in, in], by way of float64."""
        c, inverse = damped(c.double(), self.damp)
        u, s, v = torch.linalg.svd(w.double() @ c, full_matrices=False)
        kept = slice(0, self.r) if self.mode == "ipm" else slice(len(s) - self.r, None)
        return shared_out(u[:, kept], s[kept], v[kept] @ inverse, self.alpha / self.r)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        plain = LoRA(r=2 * self.r, alpha=2 * self.alpha, dropout=self.dropout, at=self.at)
        return replace(plain, layers=self.layers), joined(part), {}


class Covariance:
    """total: the sum of x^T x [in, in] in float32 over `samples`; each row of a batch [batch, ..., in] is one."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.samples = 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        x = x.detach().float().reshape(x.shape[0], -1, x.shape[-1])
        x = x / x.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        flat = x.flatten(0, 1)
        self.total = flat.mT @ flat if self.total is None else self.total.addmm_(flat.mT, flat)
        self.samples += len(x)


def damped(c: Tensor, damp: float) -> Pair:
    """C + damp mean(diag C) I and its inverse, damp doubled until |C C^-1 - I| < 0.05."""
    eye = torch.eye(len(c), dtype=c.dtype, device=c.device)
    mean = c.diagonal().mean()
    while True:
        made = c + damp * mean * eye
        inverse, failed = torch.linalg.inv_ex(made)
        if not failed and torch.linalg.matrix_norm(made @ inverse - eye) < CLOSE:
            return made, inverse
        if not mean > 0:
            raise GraftError("calibrate corda", "inputs that are all zero, or not finite", "give other batches")
        damp = 2 * damp if damp else 1e-6
