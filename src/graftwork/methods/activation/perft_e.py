"""PERFT-E: an adapter inside of every expert of a frozen mixture-of-experts layer, driven by the frozen router.

Liu et al. 2024, "PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model", arXiv 2411.08212.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, fraction, number, positive, where
from graftwork.core.initial import kaiming_uniform, parameter, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.products.dropout import drop

from .forms.nonlinear import ACTIVATIONS


@method("perft_e")
@dataclass(frozen=True)
class PERFTE(Method):
    """y = sum_{i in top-K} p_i (E_i(h) + s U_i g(D_i h)),  D_i [r, d],  U_i [d, r];  p, the choice and the experts E_i are the backbone's.

    r: width.  scale: s (alpha / r of the LoRA form).  act: g, "none" for the LoRA form.  dropout: on h with "none", otherwise after g, in
        training only.
    Sits where a module holds the weights of all experts and is called with the tokens, the choice and p (transformers' own); other weights
    of that module are left out.  Init: D kaiming-uniform (a = sqrt 5), U zero, the identity.  Not mergeable: E_i is not linear.
    Parameters per layer: E 2 d r for E experts.  Source: section 3.2.
    When: adapters inside of the backbone's own experts, under its own router.
    """

    r: int = positive(8)
    scale: float = number(1.0)
    act: str = choice("none", *ACTIVATIONS)
    dropout: float = fraction(0.0)
    at: str = where("expert.down")

    def build(self, site: Site, part: Part) -> WithinExperts | None:
        if site.role != "expert.down":
            return None
        if not site.weight.batch:
            found, do = (
                "every expert is a module of its own",
                "use perft(variant='R'), or a bottleneck at these modules",
            )
            raise GraftError(f"{self} at {site.key}", found, do)
        taken = inspect.signature(site.module.forward).parameters.values()
        if len(taken) < 3 and all(p.kind is not p.VAR_POSITIONAL for p in taken):
            found = f"{type(site.module).__name__} is not told which experts a token has"
            raise GraftError(f"{self} at {site.key}", found, "use perft(variant='R')")
        return WithinExperts(self, site)

    def count(self, site: Site) -> int:
        return 2 * site.weight.copies * self.r * site.weight.d_out if site.role == "expert.down" else 0


class WithinExperts(Delta):
    """down = D [E, r, d],  up = U [E, r, d], each of its matrices transposed."""

    def __init__(self, method: PERFTE, site: Site) -> None:
        super().__init__()
        shape = (site.weight.copies, method.r, site.weight.d_out)
        like = site.like
        self.down, self.up = parameter(shape, kaiming_uniform(), like), parameter(shape, zeros, like)
        self.method = method

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y: Tensor = base(*args, **kwargs)
        h, chosen, p = self.routing(*args, *kwargs.values())
        experts, r, d = self.down.shape
        # some routers send a token to the expert number E, which is none
        gate = p.new_zeros(len(p), experts + 1).scatter_add(-1, chosen, p)[:, :experts].to(h.dtype)
        m, rate = self.method, self.method.dropout if self.training else 0.0
        h = drop(h.reshape(-1, d), rate if m.act == "none" else 0.0)
        inner = ACTIVATIONS[m.act](
            F.linear(h, self.down.flatten(0, 1))
        )  # [tokens, E r]: thin, and most of it is multiplied by 0
        inner = drop(inner, 0.0 if m.act == "none" else rate) * gate.repeat_interleave(r, -1)
        return y + m.scale * (inner @ self.up.flatten(0, 1)).view(y.shape)

    def routing(self, h: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """h [tokens, d], the numbers of the experts of each token [tokens, K] and their p [tokens, K]."""
        tensors = [t for t in given if isinstance(t, Tensor)]
        chosen = next((t for t in tensors if not t.is_floating_point()), None)
        p = next((t for t in tensors if t.is_floating_point()), None)
        if chosen is None or p is None or chosen.shape != p.shape or chosen.shape[0] * h.shape[-1] != h.numel():
            found = (
                f"called with {[list(t.shape) for t in (h, *tensors)]}, not [tokens, d], [tokens, K] and [tokens, K]"
            )
            raise GraftError(f"{self.method} at {self.key}", found, "use perft(variant='R')")
        return h, chosen, p
