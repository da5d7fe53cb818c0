"""LLaMA-Adapter: prompts with an attention of their own, behind a gate that starts at zero.

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.attention import Attention, projected
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, number, positive, where
from graftwork.core.initial import normal, parameter, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site


@method("llama_adapter")
@dataclass(frozen=True)
class LlamaAdapter(Method):
    """out = softmax(q K^T s) V + squash(g) softmax(q K_P^T s) V_P,  K_P = W_k P,  V_P = W_v P,  P [length, d].

    Identity at init (g = 0). The second softmax is separate, so that the attention over the tokens stays what it was.
    W_k and W_v are the layer's frozen projections; K_P is not rotated, and every query sees it.
    length: rows of P (K of the paper).  top: only the topmost `top` layers of each tower (L of the paper; None: all).
    gate: one g "per_head", or one "scalar" per layer.  squash: "tanh" (the authors' code) or "none" (the paper, PEFT).
    Init: P N(0, init_std^2), g zero.
    Parameters per layer: length d + heads (or + 1).  Source: Zhang et al. 2023, eq. 3 to 7; OpenGVLab/LLaMA-Adapter.
    When: an instruction-following adapter on a decoder, from a start that is exactly the backbone.
    """

    length: int = positive(10)
    top: int | None = positive(None)
    gate: str = choice("per_head", "per_head", "scalar")
    squash: str = choice("tanh", "tanh", "none")
    init_std: float = number(1.0, low=0.0)
    at: str = where("self.attn")

    lr = 1e-2

    def build(self, site: Site, part: Part) -> Prompted | None:
        if not self.reaches(site):
            return None
        keys, values = part.inside(site, "k"), part.inside(site, "v")
        if len(keys) != 1 or len(values) != 1 or keys[0].role != "k":
            raise GraftError(
                f"{self} at {site.key}",
                "the key and value projections of this attention cannot be told apart",
                "use prefix, which needs no projections, or other sites",
            )
        return Prompted(self, site, keys[0], values[0])

    def reaches(self, site: Site) -> bool:
        """Whether the site is in the topmost layers."""
        return self.top is None or site.layer is None or site.layer >= site.depth - self.top

    def gates(self, site: Site) -> int:
        """How many gates an attention has."""
        if self.gate == "scalar":
            return 1
        if site.heads is None:
            raise GraftError(f"{self} at {site.key}", "its number of heads is not known", "use gate='scalar'")
        return site.heads

    def count(self, site: Site) -> int:
        return self.length * site.d + self.gates(site) if self.reaches(site) else 0


class Prompted(Delta):
    """prompt = P [length, d], gate = g [heads] or [1]."""

    def __init__(self, method: LlamaAdapter, site: Site, keys: Site, values: Site) -> None:
        super().__init__()
        like = site.like
        self.prompt = parameter((method.length, site.d), normal(method.init_std), like)
        self.gate = parameter((method.gates(site),), zeros, like)
        self.squash = method.squash
        # the frozen projections belong to the backbone: paths from the attention, never children of this delta
        self._sites = (keys, values)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        keys, values = (
            projected(self.prompt, site, site.weight.d_out // t.shape[-1]).to(q.dtype)
            for site, t in zip(self._sites, (k, v), strict=True)
        )
        keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (keys, values))
        scores = (
            (q @ keys.mT * attention.scaling).softmax(-1, dtype=torch.float32).to(q.dtype)
        )  # [batch, heads, queries, length]
        gate = self.gate.tanh() if self.squash == "tanh" else self.gate
        return attention(q, k, v, mask) + gate.to(q.dtype).view(1, -1, 1, 1) * (scores @ values)
