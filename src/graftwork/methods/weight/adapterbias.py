"""AdapterBias: a bias behind the feed-forward layer whose strength depends on the token.

Fu et al. 2022, "AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP Tasks",
arXiv 2205.00305, section 3; Allen0307/AdapterBias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, flag, where
from graftwork.core.initial import kaiming_uniform, parameter, uniform, zeros
from graftwork.core.method import Method, method, preset
from graftwork.core.plan import Host
from graftwork.core.site import Site

from .forms.biases import require_bias
from .full import Full


@method("token_bias")
@dataclass(frozen=True)
class TokenBias(Method):
    """y' = y + (w . z + b) v for y = W z + c,  v [out], w [in], b a number.  Identity at init (v = 0); mergeable.

    As a weight it is of rank one: W' = W + v w^T, c' = c + b v. A host without a bias gets one.
    reads_from: z, the "input" of the layer, or its "output" y in the place of z, w [out]: W' = W + v (w^T W), c' = c + (b + w . c) v.
    share_alpha: one (w, b) for all sites, which must be of one width; v is each site's own.
    In training a dropout of the backbone behind this layer falls on the shift, too; the released code adds it behind that.
    Init: w and b U(+-1 / sqrt(width)).
    When: as BitFit, where a bias that is the same for every token is too little; a few thousand numbers per layer.
    Parameters per site: out + width + 1; with share_alpha out, and width + 1 once.  Source: Fu et al. 2022, eq. 2 to 4.
    """

    share_alpha: bool = flag(False)
    reads_from: str = choice("input", "input", "output")
    at: str = where("down | linear | conv")

    mergeable = True

    def build(self, site: Site, part: Part) -> Shifted:
        site.weight.require_matrix("token_bias")
        require_bias(str(self), site, "choose linear layers or convolutions")
        if self.share_alpha and len(widths := {self.width(s) for s in part.sites}) > 1:
            found = f"sites of the widths {', '.join(map(str, sorted(widths)))}"
            raise GraftError(f"{self} at {site.key}: one w for all", found, "choose sites of one width")
        return Shifted(self, site, part)

    def width(self, site: Site) -> int:
        """Of w."""
        return site.weight.d_in if self.reads_from == "input" else site.weight.d_out

    def count(self, site: Site) -> int:
        return site.weight.d_out + (0 if self.share_alpha else self.width(site) + 1)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.width(sites[0]) + 1 if self.share_alpha else 0


class Alpha(nn.Module):
    """weight = w [1, width], bias = b [1]."""

    def __init__(self, width: int, like: Tensor | None) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = parameter((1, width), kaiming_uniform(), like)
        self.bias = parameter((1,), uniform(-bound, bound), like)


class Shifted(WeightDelta):
    """shift = v [out];  alpha: w and b, of its own or in common with all sites."""

    lasting = True

    def __init__(self, method: TokenBias, site: Site, part: Part) -> None:
        super().__init__()
        w = site.weight

        def make() -> Alpha:
            return Alpha(method.width(site), w.like)

        self.shift = w.vector(w.d_out, zeros)
        self.own = None if method.share_alpha else make()
        # in a tuple: it hangs at the model's root, once
        self._common: tuple[Alpha, ...] = (part.shared("alpha", make),) if method.share_alpha else ()
        self.additive = self.by_input = method.reads_from == "input"

    @property
    def alpha(self) -> Alpha:
        return self.own if self.own is not None else self._common[0]

    def sources(self) -> Iterator[nn.Module]:
        yield from (self, *self._common)

    def weight(self, w: Tensor) -> Tensor:
        row = self.alpha.weight
        return w + self.shift[:, None] * (row if self.by_input else row @ w)

    def bias(self, b: Tensor | None) -> Tensor | None:
        strength = self.alpha.bias
        if b is None:
            return strength * self.shift
        return b + (strength if self.by_input else strength + self.alpha.weight @ b) * self.shift

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y = base(x)
        strength = F.linear(x if self.by_input else y, self.alpha.weight, self.alpha.bias)
        return torch.addcmul(y, strength.to(y.dtype), self.shift.to(y.dtype))


@preset("adapterbias")
def AdapterBias(share_alpha: bool = False, reads_from: str = "input", norms: bool = True) -> list[Method]:
    """y + (w . z + b) v behind the second feed-forward layer, and the layer norms there and at the embeddings trained.

    share_alpha, reads_from: of token_bias; reads_from="output" where the models of speech put it.
    norms: LayerNorms behind (in pre-norm blocks before) the feed-forward and at the embeddings; those of attention stay.
    When: text classification and speech at the budget of BitFit, 0.05% of the backbone.
    Parameters: L (d + d_ff + 1), and 2 d (L + 1) for the norms; BERT-base 46,092 and 19,968.  Source: Fu et al. 2022.
    """
    shifts = TokenBias(share_alpha=share_alpha, reads_from=reads_from)
    return [shifts, Full(at="mlp.norm, /(?i)embed.*norm/ | mlp.norm")] if norms else [shifts]
