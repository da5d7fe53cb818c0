"""ReFT: editing hidden states at a few positions of the prompt, inside a learned low-rank subspace.

Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", arXiv 2404.03592, eq. 2 and 3, and
stanfordnlp/pyreft.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, fraction, positive, text, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.nonlinear import ACTIVATIONS
from .forms.reft import Reft
from .forms.subspace import VARIANTS


@method("loreft")
@dataclass(frozen=True)
class LoReFT(Method):
    """h' = h + R^T (W h + b - R h),  R [r, d] with R R^T = I,  W [r, d],  b [r], at a few positions of the prompt.

    variant: "loreft" above · "noreft" R free · "direft" h + R^T (W h + b), R free · "direft_orthonormal" the same, R
        R^T = I (as pyreft) ·
        "consreft" h + R^T (b - R h) · "lobireft" h + R^T b.  act: of W h + b.
    positions: "p7+s7" the first 7 and last 7 tokens of the prompt ("f1", "l1" likewise), "all".  tied: one (R, W, b)
        for both, or one each.
        Padding is left out; a prompt shorter than p + s is edited once.  The prompt is what the model was called
        with, or its first
        `prompt_length` tokens (context, a number or one per row).  Decoding steps with a key-value cache are not
        edited.
    init: "random" R orthogonal, W and b as nn.Linear; "identity" W = R, b = 0 (direft: W = 0).
    dropout: on the added term, in training.  drop_state: on the whole edited state, as pyreft does.
    Parameters per site: r (2 d + 1) (r (d + 1) without W), twice if not tied.  Stored: R itself, W and b.
    When: a handful of parameters on the states of a few positions of a prompt; not for long generation, whose tokens it does not
        edit.
    """

    r: int = positive(8)
    positions: str = text("p7+s7")
    variant: str = choice("loreft", *VARIANTS)
    tied: bool = flag(True)
    act: str = choice("none", *ACTIVATIONS)
    init: str = choice("random", "random", "identity")
    dropout: float = fraction(0.0)
    drop_state: bool = flag(False)
    at: str = where("encoder.block | block | linear")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.span  # noqa: B018  (checks the text)
        if self.init == "identity" and (self.variant == "consreft" or self.act != "none"):
            asked = f"LoReFT(init='identity', variant={self.variant!r}, act={self.act!r})"
            raise GraftError(asked, "it cannot start as the identity", "leave init='random'")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Only with init="identity"."""
        return self.init == "identity"

    @property
    def span(self) -> tuple[int, int] | None:
        """(first p, last s) positions, or None for all."""
        if self.positions == "all":
            return None
        found = re.fullmatch(r"(?:[pf](\d+))?(?:(?:^|(?<=\d)\+)[sl](\d+))?", self.positions)
        p, s = (int(g or 0) for g in found.groups()) if found else (0, 0)
        if p + s == 0:
            raise GraftError(
                f"LoReFT(positions={self.positions!r})", "no positions", "write 'p7+s7', 'f1', 'l1' or 'all'"
            )
        return p, s

    @property
    def sets(self) -> int:
        """How many (R, W, b) a site has."""
        return 1 if self.tied or self.span is None or 0 in self.span else 2

    def build(self, site: Site, part: Part) -> Reft:
        if self.r > site.d:
            raise GraftError(
                f"{self} at {site.key}", f"r={self.r} directions in {site.d} dimensions", "choose a smaller r"
            )
        if self.span is not None and site.tower == "decoder" and "encoder" in part.anatomy.towers:
            raise GraftError(
                f"{self} at {site.key}",
                "the prompt of an encoder-decoder is in its encoder",
                "use at='encoder.block' or positions='all'",
            )
        return Reft(self, site)

    def count(self, site: Site) -> int:
        return self.sets * self.r * ((2 if VARIANTS[self.variant][0] else 1) * site.d + 1)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """R is stored itself, not the parameter that it is made from."""
        tensors = {key: delta.folded() for key, delta in part.deltas.items() if isinstance(delta, Reft)}
        return self, tensors, {}
