"""VL-PET: encoder adapters whose whole output is gated, as finely as is asked for, and small adapters on the decoder's values.

Hu et al. 2023, "VL-PET: Vision-and-Language Parameter-Efficient Tuning via Granularity Control", arXiv 2308.09804, section 3;
HenryHZY/VL-PET, whose "small" gate is a mean over padding, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, number, positive, where
from graftwork.core.method import Method, method, preset
from graftwork.core.site import Site

from ..weight.full import Full
from .bottleneck import Bottleneck
from .forms.granular import GATES, Granular
from .forms.nonlinear import ACTIVATIONS
from .forms.residual import check_position


@method("vl_pet_encoder")
@dataclass(frozen=True)
class VLPETEncoder(Method):
    """y' = G * (y + U g(D y + b_D) + b_U) for the input x and the output y of a sub-layer [batch, seq, d_model],  D [d, d_model] of
    `heads` slices.

    gate: "large" G = sigmoid(U' g(D' x + b') + b''), one number per token and channel, D' [gate_dim, d_model] ·
        "middle_x" sigmoid(w . (x + y) + b), one per token · "middle_y" 1 + z, one per channel, z = 0 at first ·
        "small" the mean of sigmoid(w . [x ; y + U g(..) + b_U] + b) over an example's real tokens, one for all of it.
    heads: must divide d; the slices' outputs side by side are those of one D, so that they change no result.
    source: x is the "entry" of the sub-layer, as it sees it, or the "residual" stream in front of a pre-norm one (VL-T5).
    Init: matrices and w N(0, init_std^2), biases zero. Not the identity.  "small" sees later tokens: no key-value cache.
    When: an encoder-decoder that is fed pictures and text, or any encoder whose adapters shall be weighed token by token.
    Parameters per sub-layer: 2 d d_model + d + d_model, and large 2 gate_dim d_model + gate_dim + d_model, middle_x d_model + 1,
        middle_y d_model, small 2 d_model + 1.  Source: Hu et al. 2023, eq. 5 to 9.
    """

    d: int = positive(96)
    heads: int = positive(4)
    gate: str = choice("large", *GATES)
    gate_dim: int = positive(96)
    act: str = choice("gelu_new", *ACTIVATIONS)
    source: str = choice("entry", "entry", "residual")
    init_std: float = number(0.02, low=0.0)
    at: str = where("encoder.self.attn, encoder.mlp | attn, mlp | linear | conv")

    identity = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d % self.heads:
            found = f"{self.heads} heads, which do not divide {self.d}"
            raise GraftError(f"VLPETEncoder(d={self.d}, heads={self.heads})", found, "choose heads that do")

    def build(self, site: Site, part: Part) -> Granular:
        asked = f"{self} at {site.key}"
        check_position("residual" if self.source == "residual" else "parallel", site, asked)
        if self.gate == "middle_x" and self.entry_width(site) != site.d:
            found = f"an input of {self.entry_width(site)} and an output of {site.d}"
            raise GraftError(f"{asked}: x + y", found, "choose another gate, or whole sub-layers")
        if self.gate == "small" and any(s.cross and s.tower == site.tower for s in part.anatomy.sites):
            found = "a decoder with cross-attention: the attention mask is the encoder's"
            raise GraftError(asked, found, "choose another gate, or the encoder's sites")
        return Granular(self, site)

    def entry_width(self, site: Site) -> int:
        """Of x."""
        return site.weight.d_in if site.entry is None and self.source == "entry" else site.d

    def count(self, site: Site) -> int:
        d, seen = site.d, self.entry_width(site)
        gate = {"large": self.gate_dim * (seen + d + 1) + d, "middle_x": d + 1, "middle_y": d, "small": seen + d + 1}
        return 2 * self.d * d + self.d + d + gate[self.gate]


@preset("vl_pet")
def VLPET(
    d: int = 96,
    heads: int = 4,
    gate: str = "large",
    source: str = "entry",
    decoder_scale: float = 1.0,
    norms: bool = True,
) -> list[Method]:
    """Gated adapters in the encoder; in the decoder V = W_v k + s (U gelu(D k + b_D) + b_U) on the encoder's states k; encoder norms.

    d, heads, gate, source: of vl_pet_encoder.  decoder_scale: s.  VL-T5: d=192, source="residual", decoder_scale=0.3.
    norms: the encoder's layer norms are trained; what embeds pictures is the run's to choose, as Full(at="/visual/").
    When: question answering and captions by a small encoder-decoder over image features, several tasks at once.
    Parameters: those of vl_pet_encoder, and 2 * 96 d_model + 96 + d_model per decoder layer.  Source: Hu et al. 2023, section 3.
    """
    values = Bottleneck(
        d=96, act="gelu_new", position="parallel", scale=decoder_scale, init="bert", at="decoder.cross.v | cross.v"
    )
    adapters: list[Method] = [VLPETEncoder(d=d, heads=heads, gate=gate, source=source), values]
    return [*adapters, Full(at="encoder.norm")] if norms else adapters
