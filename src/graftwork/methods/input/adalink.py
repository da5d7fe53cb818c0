"""AdaLink: a residual bottleneck between the embeddings of a modality and the first block.

Wang et al. 2023, "Non-Intrusive Adaptation: Input-Centric Parameter-efficient Fine-Tuning for Versatile Multimodal Modeling",
arXiv 2310.12100. Its rank, initial values and activation are not published in full: those here are a choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.fields import choice, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from ..activation.bottleneck import Bottleneck
from ..activation.forms.nonlinear import ACTIVATIONS
from ..activation.forms.residual import Residual
from ..weight.hydra import Hydra, TwoHeads
from .invertible import like


@method("adalink")
@dataclass(frozen=True)
class AdaLink(Method):
    """e' = e + U act(D e) for every embedding e,  D [r, d], U [d, r].  Identity at init (U = 0); the blocks stay as they are.

    act: "none" is linear, and then folds where one weight makes the embeddings: into the table, E' = E + E D^T U^T, or into a linear
        projector, W' = W + U D W, b' = b + U D b.
    at: one module for each modality. "embedded" is text (in an encoder-decoder that of the encoder), "embed" the patches of a vision
        tower; for images in a language model name the last layer of the projector too, "embedded, /projector.linear_2$/".
    Init: D U(-1/sqrt(d), 1/sqrt(d)), U zero.
    Parameters: 2 d r for each modality, whatever the depth.
    When: a multimodal or instruction model whose inside must stay untouched: only what enters it is adapted, as with prompts but
        without their length.
    """

    r: int = positive(64)
    act: str = choice("none", *ACTIVATIONS)
    at: str = where("embedded | embed")

    layered = False

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """A linear one, at a single weight."""
        return self.act == "none"

    def build(self, site: Site, part: Part) -> Delta:
        if self.linear(site):
            site.weight.require_matrix("adalink")
            return TwoHeads(
                Hydra(r_parallel=0, r_sequential=self.r, scale=1.0, bias=False, init="kaiming"), site.weight
            )
        return Residual(Bottleneck(d=self.r, act=self.act, bias=False), site, like(site, part))

    def linear(self, site: Site) -> bool:
        """Whether the site is one weight, in which U D can be folded."""
        stored = site.module._parameters.get(site.param)
        return self.act == "none" and stored is not None and (site.width is None or stored.dim() > 1)

    def count(self, site: Site) -> int:
        if self.linear(site):
            return site.weight.copies * 2 * self.r * site.weight.d_out
        return 2 * self.r * site.d
