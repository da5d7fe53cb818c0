"""Visual prompt tuning: trained tokens between the class token and the patches, at the input or afresh in every block.

Jia et al. 2022, "Visual Prompt Tuning", arXiv 2203.12119, section 3.2; KMnP/vpt. There the whole encoder is put into evaluation
while it trains; here the backbone's own dropout is as the model's mode says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import count, flag, fraction, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.visual import Projection, Tokens, VisualPrompt, bound, check_block, windowed


@method("vpt")
@dataclass(frozen=True)
class VPT(Method):
    """z = [cls ; drop(proj(P_i)) ; patches] in front of block i,  P_i [num_tokens, d].  Not the identity at init.

    deep: every block has a P_i of its own, and what becomes of it is thrown away behind the block; otherwise ("shallow") P_0 enters the
        first of the blocks and is taken out behind the last one. `layers` chooses the blocks.
    dropout: of P, in training, a mask of its own for every image.  shared: one P for all blocks.
    project: P has this width, and proj is one linear map to d for all blocks (otherwise proj is the identity).
    Prompts have no positions, and patches keep theirs. Where blocks part their tokens into windows (Swin), deep prompts stand in every
    window, as keys and values beside the window's own; shallow ones are refused.
    Init: P U(-v, v), v = sqrt(6 / (3 h w + width of P)) for patches of h x w pixels of 3 colours; proj Kaiming-normal over its outputs.
    Parameters: deep L num_tokens d, shallow or shared num_tokens d; with project its width in the place of d, and project d + d more.
    Source: Jia et al. 2022, eq. 4 to 8.
    When: vision transformers whose blocks must stay as they are: a few trained tokens, in the first layer or in all.
    """

    num_tokens: int = count(50)
    deep: bool = flag(True)
    dropout: float = fraction(0.1)
    project: int | None = positive(None)
    shared: bool = flag(False)
    at: str = where("block")

    identity = False

    def build(self, site: Site, part: Part) -> VisualPrompt | None:
        check_block(f"{self} at {site.key}", site, part)
        stack = [s for s in part.sites if s.tower == site.tower]
        widths = {s.d for s in part.sites}
        if len(widths) > 1 and (self.shared or self.project):
            do = "use shared=False and no project, or choose the layers of one width"
            raise GraftError(f"{self}", f"blocks of widths {sorted(widths)}", do)
        if not self.deep and windowed(site.module):
            found = f"{type(site.module).__name__} parts its tokens into windows, each with prompts of its own"
            raise GraftError(f"{self} at {site.key}", found, "use deep=True")
        first, last = (True, True) if self.deep else (site is stack[0], site is stack[-1])
        if not (first or last):
            return None
        made = (self.tokens(site, part), self.projection(site, part)) if first else (None, None)
        return VisualPrompt(
            str(self), site, part, *made,
            num_tokens=self.num_tokens, dropout=self.dropout, cuts=last, shared=self.shared,
        )  # fmt: skip

    def tokens(self, site: Site, part: Part) -> Tokens:
        """P of a block."""
        like, width = site.like, self.project or site.d

        def make() -> Tokens:
            return Tokens(self.num_tokens, width, bound(part, width), like)

        return part.shared("prompt", make) if self.shared else make()

    def projection(self, site: Site, part: Part) -> Projection | None:
        """proj."""
        like, width = site.like, self.project
        return None if width is None else part.shared("projection", lambda: Projection(width, site.d, like))

    def count(self, site: Site) -> int:
        return self.num_tokens * (self.project or site.d) if self.deep and not self.shared else 0

    def count_shared(self, sites: Sequence[Site]) -> int:
        d, width = sites[0].d, self.project or sites[0].d
        tables = 1 if self.shared else 0 if self.deep else len({s.tower for s in sites})
        return tables * self.num_tokens * width + (width * d + d if self.project else 0)
