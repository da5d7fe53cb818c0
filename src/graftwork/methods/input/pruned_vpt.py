"""Visual prompts that can be pruned, by whole tokens and by pieces of tokens.

Han et al. 2023, "E^2VPT: An Effective and Efficient Approach for Visual Prompt Tuning", arXiv 2307.13770, section 3.3;
ChengHan111/E2VPT. There piece j of 16 is every 16th number of a token; here, as the paper has it, it is a run of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import flag, fraction, positive, where
from graftwork.core.initial import ones, tensor
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.visual import Tokens, VisualPrompt, bound, check_block


@method("pruned_vpt")
@dataclass(frozen=True)
class PrunedVPT(Method):
    """z = [cls ; drop(P_i) * M ; patches] in front of block i,  M [num_tokens, d] = M_tok [num_tokens, 1] * M_seg, the same for all blocks.

    M_seg [num_tokens, segments] holds for equal pieces of d / segments numbers. Both start as ones, and are set by `gw.Rewinding`,
    which goes back to the start of the training with them. Until then this is vpt(deep=True).
    drop: a token whose M_tok is 0 is taken out; otherwise, as published, it stands there as zeros, and takes attention mass.
    Init: as vpt.  Parameters: L num_tokens d, less what M prunes.  Source: Han et al. 2023, eq. 8 to 10.
    When: the part of e2vpt that prunes prompts by importance.
    """

    num_tokens: int = positive(10)
    segments: int = positive(16)
    dropout: float = fraction(0.1)
    drop: bool = flag(False)
    at: str = where("block")

    identity = False

    def build(self, site: Site, part: Part) -> PrunedPrompt:
        check_block(f"{self} at {site.key}", site, part)
        if site.d % self.segments:
            found = f"tokens of {site.d} numbers"
            raise GraftError(f"{self} at {site.key}", found, "choose a number of segments that divides it")
        like = site.like
        masks = part.shared("masks", lambda: Masks(self.num_tokens, self.segments, like))
        return PrunedPrompt(self, site, part, Tokens(self.num_tokens, site.d, bound(part, site.d), like), masks)

    def count(self, site: Site) -> int:
        return self.num_tokens * site.d


class Masks(nn.Module):
    """tokens = M_tok [n], pieces = M_seg [n, segments]."""

    tokens: Tensor
    pieces: Tensor

    def __init__(self, n: int, segments: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens", tensor((n,), ones, like))
        self.register_buffer("pieces", tensor((n, segments), ones, like))

    def of_width(self, d: int) -> Tensor:
        """M [n, d]."""
        return self.tokens[:, None] * self.pieces.repeat_interleave(d // self.pieces.shape[1], 1)


class PrunedPrompt(VisualPrompt):
    """tokens: P, whose pruned numbers are zero."""

    def __init__(self, method: PrunedVPT, site: Site, part: Part, tokens: Tokens, masks: Masks) -> None:
        super().__init__(str(method), site, part, tokens, num_tokens=method.num_tokens, dropout=method.dropout)
        self.drop, self.width = method.drop, site.d
        self._masks = (masks,)  # in a tuple: all blocks have the same

    @property
    def masks(self) -> Masks:
        """Those of all blocks."""
        return self._masks[0]

    def rows(self, batch: int) -> Tensor:
        rows = super().rows(batch) * self.masks.of_width(self.width)
        return rows[:, self.masks.tokens != 0] if self.drop else rows

    @property
    def pruned(self) -> int:  # type: ignore[override]
        """How many numbers of P are held at zero."""
        mask = self.masks.of_width(self.width)
        return 0 if mask.is_meta else int((mask == 0).sum())

    @torch.no_grad()
    def settle(self) -> None:
        """What the masks prune becomes zero."""
        self._made[0].prompt.mul_(self.masks.of_width(self.width))
