"""Split and merge: an adapter is trained as several sparse ones, a random one of them in each pass, and stored as their mean.

Zhang et al. 2023, "Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training" (MoSA), arXiv 2312.02923,
section 3; Theia-4869/MoSA. Its loss is `graftwork.objectives.mosa`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, inner, positive
from graftwork.core.initial import Later, drawing_from
from graftwork.core.method import Method, flatten, get, method, preset
from graftwork.core.site import Site
from graftwork.core.swap import swapped
from graftwork.sites.anatomy import Anatomy

from .inherit import Around
from .split import Split, SplitDelta, SplitWeight, layers_of


@method("split_merge")
@dataclass(frozen=True)
class SplitMerge(Around):
    """W_i = W_0 + M_i * D_i in the place of a matrix W of the method inside, i of 1 ... copies; the masks M_i in {0, 1} are random,
    do not overlap, cover W, and differ by one entry in size at most.

    In a pass that trains, every site draws an i of its own for each of its matrices; otherwise W is what is stored,
    merge "add": W_0 + (1 / copies) sum_i M_i * D_i, the mean of the W_i · "joint": W_0 + sum_i M_i * D_i.
    Only the entries under M_i are parameters, so that no weight decay and no momentum moves another, and what was not drawn has no
    gradient.  The bias of a matrix has `copies` whole copies, drawn with it, whose mean is stored.
    share: "down" leaves the matrices at the input as they are and splits those at the output; "none" splits both.
    of: a method with such matrices (bottleneck, lora). The file is that of this method, to which the adapter has become merged.
    When: a bottleneck or LoRA shall learn more at the same stored size, and each batch may pass the model twice.
    Parameters: those of the method inside, and copies - 1 more biases of the split matrices.  Source: Zhang et al. 2023, section 3.2.
    """

    of: Method = inner("bottleneck")
    copies: int = positive(4)
    share: str = choice("down", "down", "none")
    merge: str = choice("add", "add", "joint")

    def build(self, site: Site, part: Part) -> Delta | None:
        delta = self.host(site, part)
        if delta is None:
            return None
        layers = layers_of(delta, self.share)
        if not layers:
            found = f"{self.of.name} has no matrix called up" + ("" if self.share == "down" else " or down")
            raise GraftError(f"{self} at {site.key}", found, "split a bottleneck or a lora")
        if min(delta.get_parameter(name).numel() for name in layers) < self.copies:
            raise GraftError(f"{self} at {site.key}", "a matrix of fewer entries than copies", "ask for fewer copies")
        made = (SplitWeight if isinstance(delta, WeightDelta) else SplitDelta)()
        made.setup(delta, layers, self.copies, joint=self.merge == "joint")
        return made

    def host(self, site: Site, part: Part) -> Delta | None:
        """The delta of the method inside."""
        delta = self.of.build(site, part)
        if isinstance(delta, WeightDelta):
            delta.place(site.key, site.weight)
        return delta

    def count(self, site: Site) -> int:
        with drawing_from(Later()):  # the sizes of the biases are known when they are built
            delta = self.host(site, Part(self.of, [site], Anatomy("", (site,), ())))
        if delta is None:
            return 0
        biases = [delta.get_parameter(bias).numel() for bias in layers_of(delta, self.share).values() if bias]
        return self.of.count(site) + (self.copies - 1) * sum(biases)

    @torch.no_grad()
    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The method inside, with the merged matrices."""
        within = Part(self.of, part.sites, part.anatomy)
        within.shared_modules = part.shared_modules
        splits = [d for d in part.deltas.values() if isinstance(d, Split)]
        within.deltas = {key: d.delta for key, d in part.deltas.items() if isinstance(d, Split)}
        merged = [(d.delta._parameters, name, value) for d in splits for name, value in d.merged().items()]
        with swapped([(home, name) for home, name, _ in merged], [value for *_, value in merged]):
            stored, tensors, shared = self.of.fold(within)
        return replace(stored, at=self.at, layers=self.layers), tensors, shared


@preset("mosa")
def MoSA(d: int = 64, copies: int = 4, share: str = "down", merge: str = "add") -> list[Method]:
    """AdaptFormer's parallel adapter, x' + MLP(LN2 x') + 0.1 (U drop(gelu(D LN x' + b_D)) + b_U) with an LN of its own, split and merged.

    d: bottleneck width.  copies, share, merge: of split_merge. Other hosts: gw.SplitMerge(of=gw.LoRA(r=64)) and the like.
    Two passes of every batch, and gw.auxiliary_loss's place taken by `graftwork.objectives.mosa.mosa_loss`.
    When: image classification, where AdaptFormer fits and training may cost twice as much.
    Parameters stored: those of the adapter, 2 d_model d + d + d_model, and 2 d_model of LN.  Source: Zhang et al. 2023, section 4.
    """
    adapter = get("bottleneck")(
        d=d, act="gelu", position="residual", norm="before", scale=0.1, dropout=0.1, init="lora", at="mlp"
    )
    return [SplitMerge(of=one, copies=copies, share=share, merge=merge) for one in flatten(adapter)]
