"""Adaptable adapters: every layer learns its activation function, and whether it has an adapter at all.

Moosavi et al. 2022, "Adaptable Adapters", arXiv 2205.01549, section 3; UKPLab/adaptable-adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.fields import choice, flag, number, positive, where
from graftwork.core.initial import parameter, values, zeros
from graftwork.core.kept import Keeper
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from ..weight.dylora import Steps
from .forms.nonlinear import ACTIVATIONS, starts
from .forms.rational import Rational


@method("adaptable_adapters")
@dataclass(frozen=True)
class AdaptableAdapters(Method):
    """A(h) = U F(D h + b_D) + b_U on the output h of a feed-forward layer, F a learned rational function, D [m, d], U [d, m].

    In training out = w_0 h + w_1 A(h), w = softmax((z + g) / tau), g_i = -log(-log u_i), u ~ U(0, 1); in evaluation h where
    z_0 >= z_1, otherwise A(h), which replaces h: the block's own residual is what stays.
    switch: False leaves z out, h + A(h): for the layers that `gw.focused` found useful (AA-focused).
    draw: one g for each "example", for each "token", or for each "channel" of each token.
    tau: of the softmax; with anneal = r > 0, max(tau_min, tau exp(-r t)) after t steps of gw.step.
    prior: probability of the adapter at first, z = (1/2, 1/2 + log(prior / (1 - prior))).
    d: m; None takes d_model // reduction.  p, q: degrees of F.  rational: what F is at first (see `Rational`).
    init, init_std: of D and U as for bottleneck; biases zero.
    switch_lr, rational_lr: learning rates of z and of F as multiples of the adapter's, in `adapter.groups(lr)`.
    When: little data, or a search for the layers that need an adapter, which then are trained alone.
    Parameters per site: 2 d_model m + m + d_model + p + 1 + q, and 2 with the switch.  Source: Moosavi et al. 2022, eq. 1 to 4.
    """

    d: int | None = positive(None)
    reduction: int = positive(16)
    switch: bool = flag(True)
    draw: str = choice("example", "example", "token", "channel")
    tau: float = number(0.1, low=1e-6)
    anneal: float = number(0.0, low=0.0)
    tau_min: float = number(0.0, low=0.0)
    prior: float = number(0.5, low=1e-9, high=1 - 1e-9)
    p: int = positive(5)
    q: int = positive(4)
    rational: str = choice("one", "one", *ACTIVATIONS)
    init: str = choice("bert", "lora", "houlsby", "bert", "zero_up")
    init_std: float = number(0.02, low=0.0)
    switch_lr: float = number(500.0, low=0.0)
    rational_lr: float = number(100.0, low=0.0)
    at: str = where("mlp | linear | conv")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Only without a switch, where U starts at zero."""
        return not self.switch and self.init in ("lora", "zero_up")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Steps, where tau falls."""
        return ("step",) if self.anneal else ()

    def build(self, site: Site, part: Part) -> Switched:
        if self.anneal:
            part.shared("schedule", Steps)
        return Switched(self, site)

    def width(self, site: Site) -> int:
        """m at this site."""
        return self.d if self.d is not None else max(1, site.d // self.reduction)

    def count(self, site: Site) -> int:
        m = self.width(site)
        return 2 * m * site.d + m + site.d + self.p + 1 + self.q + (2 if self.switch else 0)

    def rate(self, tensor: str) -> float:
        return self.switch_lr if tensor == "logits" else self.rational_lr if tensor.startswith("rational.") else 1.0

    def begin(self, part: Part) -> None:
        if self.anneal:
            t = int(part.shared("schedule", Steps).steps)
            for delta in part.deltas.values():
                delta.tau = max(self.tau_min, self.tau * math.exp(-self.anneal * t), 1e-6)  # type: ignore[assignment]

    def step(self, part: Part, progress: float) -> None:
        if self.anneal:
            part.shared("schedule", Steps).steps += 1
            self.begin(part)  # a compiled pass does not ask


class Switched(Delta):
    """down = D, up = U, with their biases; rational = F; logits = z [2], None without a switch."""

    reading = "y"

    def __init__(self, method: AdaptableAdapters, site: Site) -> None:
        super().__init__()
        m, d, like = method.width(site), site.d, site.like
        down, up = starts(method.init, method.init_std)
        self.down, self.up = parameter((m, d), down, like), parameter((d, m), up, like)
        self.down_bias, self.up_bias = parameter((m,), zeros, like), parameter((d,), zeros, like)
        self.rational = Rational(method.p, method.q, method.rational, like)
        first = torch.tensor([0.5, 0.5 + math.log(method.prior / (1 - method.prior))])
        self.logits = parameter((2,), values(first), like) if method.switch else None
        self.draw, self.tau = method.draw, method.tau
        self._choice: Keeper[bool] = Keeper([self])

    def adapter(self, h: Tensor) -> Tensor:
        """A(h)."""
        inner = self.rational(F.linear(h.reshape(-1, h.shape[-1]), self.down, self.down_bias))
        return F.linear(inner, self.up, self.up_bias).view(h.shape)

    def weights(self, h: Tensor) -> Tensor:
        """w [..., 2] of this pass; broadcast over tokens and channels as `draw` says."""
        assert self.logits is not None
        alike = {"example": h.dim() - 1, "token": 1, "channel": 0}[self.draw]
        u = torch.rand(*h.shape[: h.dim() - alike], *[1] * alike, 2, device=h.device)
        g = -torch.log(-torch.log(u.clamp(1e-20, 1 - 1e-7)))
        return ((self.logits.float() + g) / self.tau).softmax(-1).to(h.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.logits
        if z is None:
            return y + self.adapter(y)
        if self.training:
            w = self.weights(y)
            return w[..., 0] * y + w[..., 1] * self.adapter(y)
        if torch.compiler.is_compiling():  # a graph cannot ask
            return torch.where(z[1] > z[0], self.adapter(y), y)
        # asked again only where z has changed: asking waits for the device
        return self.adapter(y) if self._choice.get("adapter", lambda: bool(z[1] > z[0])) else y
