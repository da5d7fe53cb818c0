"""LN tuning: the gains and biases of the normalisation layers are trained, and nothing else.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning".
"""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import where
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .bitfit import Shift


@method("ln_tuning")
@dataclass(frozen=True)
class LNTuning(Method):
    """y = norm(x) * (g + dg) + (c + dc),  dg [d], dc [d] (where the norm has a bias).  Identity at init (zero);
    mergeable.

    Kept as differences, so that those of several adapters add up. The running statistics of a BatchNorm stay the
    backbone's.
    Parameters: d or 2 d per norm.  Source: Zhao et al. 2023, arXiv 2312.11420; HF PEFT's LNTuningConfig.
    When: very few parameters for a model of any kind, or as a complement of attention methods.
    """

    at: str = where("norm")

    mergeable = True
    lr = 1e-2

    def build(self, site: Site, part: Part) -> Shift | None:
        owned = {name: p for name, p in site.module._parameters.items() if p is not None}
        if any(p.dim() > 1 for p in owned.values()) or "weight" not in owned:
            raise GraftError(
                f"{self} at {site.key}",
                f"{type(site.module).__name__} is not a normalisation layer",
                "choose at='norm', or use full",
            )
        return Shift({name: p.numel() for name, p in owned.items()}, site)

    def count(self, site: Site) -> int:
        return sum(p.numel() for p in site.module._parameters.values() if p is not None)
