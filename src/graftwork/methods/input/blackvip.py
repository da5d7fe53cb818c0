"""BlackVIP's coordinator: a prompt for every image, as large as the image, drawn by a small decoder from what a frozen encoder sees.

Oh et al. 2023, "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning", arXiv 2303.14773, section 4.1; changdaeoh/BlackVIP.
`gw.SPSA` trains it without a gradient.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.decoder import STAGES, Drawn, layout

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _colours(v: Any) -> str:
    good = isinstance(v, tuple) and len(v) == 3 and all(isinstance(n, int | float) and 0 < n <= 1 for n in v)
    return "" if good else "three numbers in (0, 1], one for each colour"


def colours(default: tuple[float, ...]) -> Any:
    """A number for each colour."""
    return dataclasses.field(default=default, metadata={"check": _colours})


@method("blackvip")
@dataclass(frozen=True)
class BlackVIP(Method):
    """x~ = clip(x + eps_p dec([z ; t])),  z [batch, features] of the image, t [src_dim - features] trained.  Not the identity at init.

    dec: [z ; t] as [batch, src_dim / grid^2, grid, grid], doubled in height and width `stages` times, to 3 colours: each stage but the
        last is a transposed convolution of every channel by itself, one of 1 x 1 to 64, 32, 32, 16 channels, a norm and GELU.
    The image has grid 2^stages pixels on a side (7 and 5: 224); clip holds it in the range of colours 0 to 1 under `mean` and `std`,
    which are those of the backbone's own preprocessing (CLIP's by default).
    encoder: where z comes from: the "context", gw.context(model, features=z), is the paper's (the class token of a frozen ViT-MAE);
        "pixels" needs no encoder (the image averaged to features / 3 squares; not the paper's).
    norm: "batch" has running statistics for evaluation; "instance" those of each image, in training too.
    Init: t U(0, 0.1); convolutions as torch has them.
    Parameters: src_dim - features + 9,120 at the defaults: 9,920.  Source: Oh et al. 2023, eq. 2 and 3.
    When: the backbone is behind an interface: only its outputs for changed images are known, no gradients.
    """

    features: int = positive(768)
    src_dim: int = positive(1568)
    grid: int = positive(7)
    stages: int = positive(5)
    eps_p: float = number(1.0)
    encoder: str = choice("context", "context", "pixels")
    norm: str = choice("batch", "batch", "instance")
    mean: tuple[float, ...] = colours(CLIP_MEAN)
    std: tuple[float, ...] = colours(CLIP_STD)
    at: str = where("embed")

    identity = False
    layered = False

    def __post_init__(self) -> None:
        super().__post_init__()
        source, rest = divmod(self.src_dim, self.grid**2)
        fits = not rest and (64 % source == 0 if 0 < source < 64 else source > 0 and source % 64 == 0)
        if not fits or self.src_dim <= self.features or not 2 <= self.stages <= STAGES:
            found = f"{self.src_dim} numbers for {self.grid} x {self.grid}, {self.features} of them features"
            do = "give a src_dim of 1, 2, 4, ... 32 or a multiple of 64 channels, more than features, and 2 to 5 stages"
            raise GraftError(f"{self}", found, do)
        if self.encoder == "pixels" and self.side**2 * 3 != self.features:
            raise GraftError(f"{self}", f"{self.features} features", "give 3 n^2 of them: 768, 192, 48, 12")

    @property
    def side(self) -> int:
        """How many squares an image has on a side for encoder="pixels"."""
        return round((self.features / 3) ** 0.5)

    def build(self, site: Site, part: Part) -> Drawn | None:
        image = len(site.weight.kernel) == 2 and site.weight.stored[1] == 3  # a table of tokens or positions is none
        return Drawn(self, site) if image else None

    def count(self, site: Site) -> int:
        stages = layout(self.src_dim // self.grid**2, self.stages)
        inner = sum(c * spread // groups * 4 + spread + spread * out + 2 * out for c, spread, groups, out in stages)
        return self.src_dim - self.features + inner + stages[-1][-1] * 3 * 4
