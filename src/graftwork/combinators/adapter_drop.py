"""AdapterDrop: training in which the lowest layers go without their adapters, another number of them for each batch.

Rückle et al. 2021, "AdapterDrop: On the Efficiency of Adapters in Transformers", arXiv 2010.11918.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import inner
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .dropped import Dropped, DroppedDelta, DroppedWeight
from .inherit import Around


@method("adapter_drop")
@dataclass(frozen=True)
class AdapterDrop(Around):
    """Each training pass draws n ~ Uniform{0, ..., L - 1}; layers below n run the bare backbone.  Evaluation has all adapters.

    of: the method inside;  L: the number of layers of a tower. One draw for all sites (in an encoder-decoder of unequal depth, for the
        same share of both), from torch's generator for the CPU; nothing below layer n is kept for the backward pass.
    This is the robust variant: afterwards any n serves, as in gw.activate(model, 'drop(a, layers="0-4")'), and for several tasks
        'drop(a, layers="0-4") | drop(b, layers="0-4")' runs the lowest layers once. The specialised variant, n fixed, is
        `layers` of the method inside (layers="5--1").
    Identity and merging as the method inside.
    Sites outside of layers are never dropped.  Parameters: those of the method inside.  Source: section 3.
    When: adapters shall lose layers after training, or lower layers be shared by several tasks, without training again.
    """

    of: Method = inner("bottleneck")

    def build(self, site: Site, part: Part) -> Delta | None:
        if all(s.layer is None for s in part.sites):
            raise GraftError(f"{self} at {site.key}", "no site stands in a layer", "choose sites in repeated blocks")
        delta = self.of.build(site, part)
        if delta is None:
            return None
        if isinstance(delta, WeightDelta):
            delta.place(site.key, site.weight)
            return DroppedWeight(delta, site)
        return DroppedDelta(delta, site)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The stored form of the method inside."""
        within = Part(self.of, part.sites, part.anatomy)
        within.shared_modules = part.shared_modules
        within.deltas = {key: d.delta for key, d in part.deltas.items() if isinstance(d, Dropped)}
        folded, tensors, shared = self.of.fold(within)
        own = {key: {f"delta.{name}": t for name, t in given.items()} for key, given in tensors.items()}
        return dataclasses.replace(self, of=folded), own, shared
