"""Bottleneck adapters: a small residual MLP at the output of a sub-layer or block.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; Bapna and Firat 2019 (own norm, block output);
He et al. 2021, "Towards a Unified View" (scaled parallel adapters); Steitz and Roth 2024, "Adapters Strike Back"
(Adapter+).
"""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.fields import choice, flag, fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.nonlinear import ACTIVATIONS
from .forms.residual import POSITIONS, Residual, check_position


@method("bottleneck")
@dataclass(frozen=True)
class Bottleneck(Method):
    """A(h) = s (U drop(g(D norm(h) + b_D)) + b_U),  D [m, d],  U [d, m];  the skip is never scaled or dropped.

    d: bottleneck width m; None takes the site's width // reduction.  act: g.  bias: b_D and b_U.
    position (a = the sub-layer's output before the residual add, r = the residual stream before its norm, x = its
    input):
        "after" a + A(a) · "parallel" a + A(x) · "residual" a + A(r) · "before" the sub-layer and the skip both see r
        + A(r) · "sum" a + A(a + r); at a norm behind the residual add ("at='norm'" in a post-norm block) it is
        norm(z + A(norm(z))), z = a + r the norm's input: the backbone's norm twice, as in AdapterHub's Pfeiffer adapter.
        At a whole block ("at='block'") "after" edits the block's output.
    norm: a LayerNorm of its own "before" D, or "after" U (no skip in it), or "none".
    scale: s fixed;  scaling: "fixed", one learned "scalar", or a learned vector per "channel", both starting at
        `scale`.
    dropout: after g.  out_dropout: on s (...), as AdapterHub does.  drop_path: whole branches are dropped per sample in
        training, the kept ones divided by 1 - p.
    init: "houlsby" D, U truncated normal (init_std, cut at 2 std), "bert" N(0, init_std^2), "lora" D kaiming-uniform,
        U zero,
        "zero_up" D N(0, init_std^2), U zero; biases zero (b_D uniform +-1/sqrt(d) with "lora" and lora_bias).
    Parameters per site: 2 m d + (m + d with bias) + (2 d with norm) + (1 or d with learned scaling).
    When: a backbone of unknown kind, modules that cannot be merged, or tasks that are stacked and fused: the form that most
        compositions were studied with.
    """

    d: int | None = positive(None)
    reduction: int = positive(16)
    act: str = choice("gelu", *ACTIVATIONS)
    position: str = choice("after", *POSITIONS)
    norm: str = choice("none", "none", "before", "after")
    scale: float = number(1.0)
    scaling: str = choice("fixed", "fixed", "scalar", "channel")
    dropout: float = fraction(0.0)
    out_dropout: float = fraction(0.0)
    drop_path: float = fraction(0.0)
    init: str = choice("lora", "lora", "houlsby", "bert", "zero_up")
    init_std: float = number(0.02, low=0.0)
    lora_bias: bool = flag(False)
    bias: bool = flag(True)
    at: str = where("attn, mlp | linear | conv")

    @property
    def lr(self) -> float:  # type: ignore[override]
        """A sixteenth at s = 4: tried on SST-2, where a fourth diverged."""
        return Method.lr / max(1.0, self.scale) ** 2

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """With a zero up-projection the branch is exactly zero, unless a norm of its own follows it."""
        return self.init in ("lora", "zero_up")

    def build(self, site: Site, part: Part) -> Residual:
        check_position(self.position, site, f"{self} at {site.key}")
        return Residual(self, site)

    def widths(self, site: Site) -> tuple[int, int, int]:
        """(d in, m, d out) at this site."""
        reads_input = self.position == "parallel" and site.entry is None
        m = self.d if self.d is not None else max(1, site.d // self.reduction)
        return (site.weight.d_in if reads_input else site.d), m, site.d

    def reads(self, site: Site) -> int:
        return self.widths(site)[0]

    def count(self, site: Site) -> int:
        d_in, m, d_out = self.widths(site)
        norm = {"none": 0, "before": 2 * d_in, "after": 2 * d_out}[self.norm]
        scale = {"fixed": 0, "scalar": 1, "channel": d_out}[self.scaling]
        return m * (d_in + d_out) + (m + d_out if self.bias else 0) + norm + scale
