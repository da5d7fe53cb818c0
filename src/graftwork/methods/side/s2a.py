"""S2A: what is trained keeps few activations for the backward pass, and what is not trained keeps codes of a few bits.

S2A 2025, "A Unified Framework for Parameter and Memory Efficient Transfer Learning" (abstract; quantiser and side network
are our reading).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, count, flag, positive, where
from graftwork.core.initial import zeros
from graftwork.core.method import Method, method, preset
from graftwork.core.plan import first_output
from graftwork.core.site import Site

from ..activation.forms.nonlinear import ACTIVATIONS
from ..weight.bitfit import BitFit
from .forms.packing import Packing
from .forms.trail import End, Line, causal, ending, stack_of, visible

CAUSAL = "a causal block: a mean over all tokens tells of later ones"


@method("s2a_side")
@dataclass(frozen=True)
class S2ASide(Method):
    """z = y + sum_l (U_l g(D_l p_l + a_l) + c_l),  p_l = mean over the tokens of block l's output, without a graph.

    y [batch, seq, d]: output of the stack's last norm, or else of its last block: the input of the head.
    bits: while the blocks run in training, GELU, SiLU, ReLU (1 bit, exact), softmax and layer norm keep codes of so many
        bits instead of their input: of f'(x) over its range, of y, of the normalised x. Forward values are exact, a
        gradient of f is off by half a code's step at most (1.26 / 15 / 2 for GELU and 4 bits).  0: nothing is packed.
        A compiled model packs nothing.
    r: rows of D_l.  act: g.  pool: p_l is one vector for each input; False gives each token its own, as causal
        stacks need (those that say so are refused; one without attention, Mamba, says nothing).
    Identity at init (U_l, c_l zero).  Parameters: per block 2 r d + r + d.
    Source: S2A 2025 (abstract); quantiser, list of operations and side network are our reading.
    When: activations fill the memory of training; together with bitfit (s2a), whose biases keep none.
    """

    r: int = positive(16)
    bits: int = count(4)
    act: str = choice("gelu", *ACTIVATIONS)
    pool: bool = flag(True)
    at: str = where("block, top")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (0, 2, 4, 8):
            raise GraftError(f"{self}", f"codes of {self.bits} bits", "give bits=2, 4 or 8 (or 0 for none)")

    def build(self, site: Site, part: Part) -> Delta | None:
        asked, trail = f"{self} at {site.key}", f"s2a {id(part)} {site.tower}"
        if not ending(part, site):
            return None
        stack_of(part, site, asked)
        if self.pool and causal(site.module):
            raise GraftError(asked, CAUSAL, "set pool=False")
        return Outcome(trail) if site.role == "top" else Pooled(self, site, trail)

    def count(self, site: Site) -> int:
        return 0 if site.role == "top" else 2 * self.r * site.d + self.r + site.d


class Pooled(Delta):
    """down = (D_l, a_l), up = (U_l, c_l)."""

    def __init__(self, method: S2ASide, site: Site, trail: str) -> None:
        super().__init__()
        like = site.like
        self.method, self.trail, self.looked = method, trail, not method.pool
        self.down, self.up = Line(site.d, method.r, like), Line(method.r, site.d, like, zeros)

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        keeps = self.method.bits and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with Packing(self.method.bits) if keeps else nullcontext():
            out = base(*args, **kwargs)
        h = first_output(out).detach()
        if not self.looked and not torch.compiler.is_compiling():
            seen = visible(dict(enumerate(args)) | kwargs, h.shape[-2])
            if seen is not None and h.shape[-2] > 1 and not seen.triu(1).any():
                raise GraftError(f"{self.method} at {self.key}", CAUSAL, "set pool=False")
            self.looked = True  # the mask is of one kind in every pass
        p = self.pooled(h)
        self.runtime.state.setdefault(self.trail, []).append((self, p))
        return out

    def pooled(self, h: Tensor) -> Tensor:
        """p_l [batch, 1, d] of h [batch, seq, d]: the mean over real tokens."""
        if not self.method.pool:
            return h
        mask = self.runtime.mask
        if mask is None or mask.shape != h.shape[:-1]:
            return h.mean(-2, keepdim=True)
        real = mask[..., None].to(h.dtype)
        return (h * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)

    def term(self, p: Tensor) -> Tensor:
        """U_l g(D_l p + a_l) + c_l."""
        return self.up(ACTIVATIONS[self.method.act](self.down(p)))  # type: ignore[no-any-return]


class Outcome(End):
    """No parameters: adds what the blocks' side has made."""

    graph = True

    def finish(self, y: Tensor, seen: list[Any]) -> Tensor:
        """y + the sum of the terms."""
        return y + sum(step.term(p) for step, p in seen)


@preset("s2a")
def S2A(r: int = 16, bits: int = 4, prompt: Method | None = None) -> list[Method]:
    """Biases, a side network over pooled states, and packed activations: what is trained keeps no input of a matrix.

    prompt: trained tokens of the input besides, such as gw.Prompt(length=10) for text.
    Parameters: all biases + 2 r d + r + d per block.  Source: S2A 2025 (abstract).
    When: activations fill the memory of training: a third of what LoRA or full fine-tuning keeps, measured on a small ViT.
    """
    return [BitFit(), *([prompt] if prompt is not None else []), S2ASide(r=r, bits=bits)]
