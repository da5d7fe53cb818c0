"""Key-value prompts: a prefix whose keys are its values.

Han et al. 2023, "E^2VPT: An Effective and Efficient Approach for Visual Prompt Tuning", arXiv 2307.13770, eq. 5 to 7;
ChengHan111/E2VPT.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import fraction, positive, where
from graftwork.core.initial import kaiming_uniform, parameter
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.sites.heads import widths

from .forms.front import Front


@method("kv_prompt")
@dataclass(frozen=True)
class KVPrompt(Method):
    """K' = [R ; K],  V' = [R ; V],  one R [length, d] for both, split over the heads as K and V are; queries are unchanged.

    length: n_kv.  dropout: on R, in training only.  Not the identity at init: keys take attention mass.
    Init: R U(-b, b), b = sqrt(6 / (length d_head)), Kaiming-uniform of each head's [length, d_head].
    Parameters: length d per attention.  Source: Han et al. 2023, section 3.2 (with the keys and values shared, as released).
    When: the part of e2vpt that stands in keys and values.
    """

    length: int = positive(5)
    dropout: float = fraction(0.0)
    at: str = where("attn")

    identity = False

    def build(self, site: Site, part: Part) -> Tied:
        d_k, d_v = widths(site)
        if d_k != d_v:
            do = "use prefix(reparam='flat')"
            raise GraftError(f"{self} at {site.key}", f"keys of width {d_k} and values of width {d_v}", do)
        return Tied(self, site, d_k)

    def count(self, site: Site) -> int:
        return self.length * widths(site)[0]


class Tied(Front):
    """prompt = R [length, d]."""

    def __init__(self, method: KVPrompt, site: Site, d: int) -> None:
        super().__init__(method.dropout)
        fan = method.length * d // (site.heads or 1)
        self.prompt = parameter((method.length, d), kaiming_uniform(0.0, fan), site.like)

    def produced(self) -> tuple[Tensor, Tensor]:
        return self.prompt, self.prompt
