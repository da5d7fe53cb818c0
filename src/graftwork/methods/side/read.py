"""READ: a small recurrent network that walks over the depth of the frozen one and corrects its last hidden state.

Wang et al. 2023, "READ: Recurrent Adaptation of Large Transformers". Nothing is back-propagated through the
backbone.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, number, positive, where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.recurrent import CELLS, Correction, Map
from .forms.trail import Step, ending, stack_of


@method("read")
@dataclass(frozen=True)
class READ(Method):
    """h_i = Cell(x_i, h_{i-1}),  x_i = s_in RMSNorm(phi_i),  phi'_N = phi_N + s_out (W_out agg_i h_i + b_out).

    phi_i [batch, seq, d]: output of backbone block i, computed without a graph;  h_i [batch, seq, m], h_0 = 0: the
    cell's time is the depth, and each token has a state of its own.  phi'_N goes through the frozen last norm and head.
    d: m.  cell: "gru", "lstm", "rnn" (tanh), or "linear" h_i = h_{i-1} + D x_i.  agg: the "mean" of the h_i, or the "last".
    joiner: tokens see each other as the backbone's did: the cell reads [D x_i ; A_i h_{i-1} W_u], A_i [batch, seq, seq]
        the block's self-attention, its mean over the heads, without a graph. Not with a key-value cache.
    start: h_0 "zero", or P RMSNorm(the input of the first block) ("embedding").  norm: RMSNorm with a trained gain, or none.
    In an encoder-decoder it stands beside the decoder.  Identity at init (W_out and b_out zero, which is our choice).
    Parameters, of any number of layers: g (k m + m^2 + 2 m) + (m d + d) + d,  k = d, g = 3 (gru), 4 (lstm), 1 (rnn);
        "linear" m d in place of the first term;  joiner: k = 2 m, and m d + m^2 more;  embedding: m d more.
    Source: Wang et al. 2023, arXiv 2305.15348, section 3; the joiner from the paper's description (no official code).
    When: memory of training is short and the backbone is deep: what is trained does not grow with its layers.
    """

    d: int = positive(256)
    cell: str = choice("gru", *CELLS)
    agg: str = choice("mean", "mean", "last")
    joiner: bool = flag(False)
    start: str = choice("zero", "zero", "embedding")
    norm: bool = flag(True)
    s_in: float = number(1.0)
    s_out: float = number(1.0)
    at: str = where("self.attn, block, top | block, top")

    lr = 1e-2

    def build(self, site: Site, part: Part) -> Delta | None:
        asked, trail = f"{self} at {site.key}", f"read {id(part)} {site.tower}"
        if site.role == "attn":
            return Map(trail) if self.joiner and ending(part, site) else None
        if self.joiner and not any(s.role == "attn" for s in part.sites):
            raise GraftError(asked, "no self-attention whose maps could be joined", "set joiner=False")
        if not ending(part, site):
            return None
        blocks = stack_of(part, site, asked)
        if site.role == "block":
            return Step(site, trail)
        return Correction(self, site, trail, all(s.path != site.path for s in blocks))

    def count(self, site: Site) -> int:
        if site.role != "top" or site.exit is None:
            return 0
        m, d, gates = self.d, site.d, CELLS[self.cell]
        read = 2 * m if self.joiner else d
        cell = gates * (read * m + m * m + 2 * m) if gates else 0 if self.joiner else m * d
        joiner = m * d + m * m if self.joiner else 0
        return cell + joiner + m * d + d + (d if self.norm else 0) + (m * d if self.start == "embedding" else 0)
