"""(IA)^3: keys, values and the inner activations of the feed-forward are rescaled channel by channel.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Diagonal, WeightDelta
from graftwork.core.fields import choice, where
from graftwork.core.initial import ones
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site


@method("ia3")
@dataclass(frozen=True)
class IA3(Method):
    """y' = l * y for keys and values, l [d];  h' = l * h for the MLP's inner activation, l [d_ff].  Identity at init (l
    = 1); mergeable.

    The inner activation is scaled where it enters the MLP's last layer (role "down"): behind the non-linearity, where a
    negative l means what it should. In a gated MLP (T5 v1.1, LLaMA) that equals scaling the linear branch, the paper's
    wi_1: at="k, v, up" puts the vectors there. Every role but "down" is scaled at its output, its bias with it; a
    packed qkv whose rows cannot be told apart as a whole.
    side: "role" as above; "input" or "output" of every site, whatever its role.
    Parameters: d per scaled activation.  Source: Liu et al. 2022, arXiv 2205.05638, section 3.3; r-three/t-few.
    When: few-shot tasks, thousands of adapters on one backbone, batches of mixed tasks: a few vectors, the cheapest rows of all.
    """

    side: str = choice("role", "role", "input", "output")
    at: str = where("k, v, down | k, v | linear | conv")

    mergeable = True
    lr = 1e-2

    def build(self, site: Site, part: Part) -> Rescale:
        site.weight.require_matrix("ia3")
        return Rescale(site, self.at_input(site))

    def count(self, site: Site) -> int:
        return site.weight.copies * (site.weight.d_in if self.at_input(site) else site.weight.d_out)

    def at_input(self, site: Site) -> bool:
        """Whether the vector stands at the input of the site: at that of the last layer of an MLP or of an expert."""
        return site.role in ("down", "expert.down") if self.side == "role" else self.side == "input"


class Rescale(WeightDelta):
    """scale = l [*batch, d]: of the rows of the dense weight and of the bias, or (input) of its columns."""

    lasting = True

    def __init__(self, site: Site, at_input: bool) -> None:
        super().__init__()
        self.input = at_input
        self.scale = site.weight.vector(site.weight.d_in if self.input else site.weight.d_out, ones)

    def weight(self, w: Tensor) -> Tensor:
        return w * (self.scale[..., None, :] if self.input else self.scale[..., None])

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.input else b * self.scale

    def diagonal(self) -> Diagonal | None:
        return (self.scale, None, None) if self.input else (None, self.scale, None)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        if self.input:
            return base(x * self.scale.to(x.dtype))
        y = base(x)
        return y * self.scale.to(y.dtype) if torch.is_grad_enabled() else y.mul_(self.scale.to(y.dtype))
