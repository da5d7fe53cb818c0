"""Ladder side-tuning: a thin network beside the frozen one, fed by its hidden states.

Nothing is back-propagated through the backbone.
Sung, Cho and Bansal 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, count, fraction, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.inputs import Memory
from .forms.pruning import prune
from .forms.rungs import Rung, Top, norm_parts
from .forms.thin import thin_block


@method("ladder")
@dataclass(frozen=True)
class Ladder(Method):
    """s_0 = D_0 h_0;  u_i = mu_i s_{i-1} + (1 - mu_i) D_i h_i;  s_i = Side_i(u_i);  z = mu U norm(s_L) + (1 - mu) h.

    h_i: output of backbone block i (h_0 its input), computed without a graph;  h: output of the stack's last norm.
    mu = sigmoid(a / temperature), a scalar per gate, a = 0 at init.  D_i [d/r, d] and U [d, d/r] have biases.
    Side_i: a block of the backbone's own class, every width divided by r.
    z takes the place of h, or of the last block's output where there is no last norm. In an encoder-decoder the side
    decoder attends to the side encoder's last states, and only the decoder's output is changed.
    r: all widths are divided by it (rotary heads of odd width get one channel more).
    drop: every drop-th block, from the first, has no side block (4: 9 of 12 are kept; 0: all are kept).
    mix: "before" the side block (as above) or "after": s_i = mu_i Side_i(s_{i-1}) + (1 - mu_i) D_i h_i.
    dropout: on h_0.
    init: side blocks "random", or by "pruning": the strongest rows and columns of the backbone's blocks by magnitude,
        the same channels of the residual stream in all layers (by Fisher information: side.importance.reprune).
    Not the identity at init (the last gate mixes half and half). A key-value cache also holds the side blocks' keys.
    Parameters: per kept block its side block + d d/r + d/r + 1; per stack d d/r + d/r and a norm; once d d/r + d + 1.
    Source: Sung et al. 2022, section 3; ylsung/Ladder-Side-Tuning.
    When: memory of training is what is missing: no gradient passes the backbone.
    """

    r: int = positive(8)
    temperature: float = number(0.1, low=1e-6)
    drop: int = count(4)
    mix: str = choice("before", "before", "after")
    dropout: float = fraction(0.0)
    init: str = choice("random", "random", "pruning")
    at: str = where("block, top")

    identity = False

    def keeps(self, layer: int) -> bool:
        """Whether the block has a side block."""
        return self.drop == 0 or layer % self.drop != 0

    def build(self, site: Site, part: Part) -> Delta:
        if (site.layer is None and site.role != "top") or not any(s.role == "top" for s in part.sites):
            raise GraftError(f"{self} at {site.key}", "not a block, or no top to the blocks", "leave at='block, top'")
        trail, memory = f"ladder {id(part)} {site.tower}", part.shared("memory", Memory)
        if site.role == "top":
            return Top(self, site, trail, memory)
        rung = Rung(self, site, trail, memory)
        if self.init == "pruning" and rung.side is not None:
            prune(rung.side, site, part)
        return rung

    def count(self, site: Site) -> int:
        d, thin = site.d, site.d // self.r
        if site.role == "top":
            return thin * len(norm_parts(site.module)) + (d * thin + d + 1 if site.exit is not None else 0)
        total = d * thin + thin if site.layer == 0 else 0
        if self.keeps(site.layer or 0):
            with torch.device("meta"):
                side = thin_block(site, self.r, self.first(site))
            total += sum(p.numel() for p in side.parameters()) + d * thin + thin + 1
        return total

    def first(self, site: Site) -> bool:
        """Whether this is the tower's first side block."""
        return not any(self.keeps(i) for i in range(site.layer or 0))
