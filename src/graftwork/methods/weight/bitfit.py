"""BitFit: only biases are trained.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Diagonal, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import flag, where
from graftwork.core.initial import parameter, zeros
from graftwork.core.method import Method, method
from graftwork.core.plan import Host
from graftwork.core.site import Site


@method("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """b' = b + d for every bias of the chosen modules (linear maps, convolutions, norms).  Identity at init (d = 0);
    mergeable.

    at="any" is every bias of the backbone; add ", pooler" for BERT's pooler, which the official code trains with the
    classifier. at="q, up" is the paper's half-size variant: the biases of the queries and of the first MLP layer.
    add_missing: a module with a weight but no bias gets one, starting at zero; otherwise it is left out, and an error
        where no chosen module has a bias.
    Parameters: the sizes of the biases.  Source: Ben Zaken et al. 2021, arXiv 2106.10199, section 3;
        benzakenelad/BitFit.
    When: few rows are at hand, the backbone has biases (BERT, GPT-2, ViT; not Llama) and the file shall be tiny; no time is lost
        after merging.
    """

    add_missing: bool = flag(False)
    at: str = where("any")

    mergeable = True
    lr = 3e-3

    def build(self, site: Site, part: Part) -> Shift | None:
        sizes = self.sizes(site)
        if sizes:
            return Shift(sizes, site)
        if not any(self.sizes(other) for other in part.sites):
            raise GraftError(
                f"{self} at the {len(part.sites)} sites of at={self.at!r}",
                "none of these modules has a bias",
                "set add_missing=True and choose linear layers, e.g. BitFit(at='linear', add_missing=True)",
            )
        return None

    def sizes(self, site: Site) -> dict[str, int]:
        """The biases of the site by their names, and how many numbers of each belong to it."""
        owned = site.module._parameters
        if site.rows is not None:
            bias = site.weight.bias
            return {} if bias is None or (owned[bias] is None and not self.add_missing) else {bias: site.weight.d_out}
        found = {
            name: p.numel() for name, p in owned.items() if p is not None and p.dim() == 1 and name.endswith("bias")
        }
        if self.add_missing and not found and owned.get("bias", 0) is None and owned.get(site.param) is not None:
            found["bias"] = site.weight.d_out
        return found

    def count(self, site: Site) -> int:
        return sum(self.sizes(site).values())


class Shift(WeightDelta):
    """shift: one difference per vector of the host, by the vector's name. Differences of several adapters add up."""

    additive = True
    lasting = True

    def __init__(self, sizes: Mapping[str, int], site: Site) -> None:
        super().__init__()
        like = next(p for p in site.module._parameters.values() if p is not None)
        self.shift = nn.ParameterDict({name: parameter((size,), zeros, like) for name, size in sizes.items()})
        self.rows = site.rows

    def names(self) -> tuple[str, ...]:
        return tuple(self.shift.keys())

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        d = self.shift[name]
        if self.rows is None:
            return d if stored is None else stored + d
        a, b = self.rows
        return torch.cat([stored[:a], stored[a:b] + d, stored[b:]]) if stored is not None else d

    def diagonal(self) -> Diagonal | None:
        return (None, None, self.shift["bias"]) if self.names() == ("bias",) else None

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        return base(x).add_(self.shift["bias"])
