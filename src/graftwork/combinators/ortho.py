"""Orthoadapters: adapters whose output is pushed to be orthogonal to the representation that it is added to.

Vidoni, Vulić and Glavaš 2020, "Orthogonal Language and Task Adapters in Zero-Shot Cross-Lingual Transfer", arXiv 2012.06460.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, inner, number
from graftwork.core.method import Method, flatten, get, method, preset
from graftwork.core.site import Site

from .inherit import Around


@method("ortho")
@dataclass(frozen=True)
class Ortho(Around):
    """L_ORT = weight mean_{i,t} cos(x_it, a_it)^2,  a_it what the adapter adds to x_it at layer i and token t; padding is left out.

    of: the method inside, which adds to an activation (a bottleneck).  form: "squared", or "abs" |cos| in the place of cos^2.
    mode: "joint" L_ORT is a part of gw.auxiliary_loss(model); "alternating" it has an optimiser step of its own for each batch:
            loss.backward(), optimizer.step(), optimizer.zero_grad()
            model(**batch), gw.auxiliary_loss(model, apart=True).backward(), optimizer.step(), optimizer.zero_grad()
        which graftwork train does by itself.
    weight: lambda. 0 is the method inside.  cos is 0 where a is 0 (U at its start), and so is its gradient.
    The model and what is stored are those of the method inside; frozen adapters have no L_ORT.
    The paper's own loss is a sum of cosines over layers and tokens; the square, whose least value is orthogonality, and the mean are ours.
    Parameters: those of the method inside.  Source: section 3.2.
    When: two parts of an adapter shall learn different things (a language and a task): their outputs are kept orthogonal.
    """

    of: Method = inner("bottleneck")
    weight: float = number(1.0, low=0.0)
    mode: str = choice("alternating", "alternating", "joint")
    form: str = choice("squared", "squared", "abs")

    mergeable = False

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """An optimiser step of its own."""
        return ("apart",) if self.mode == "alternating" and self.weight else ()

    def build(self, site: Site, part: Part) -> Delta | None:
        delta = self.of.build(site, part)
        if delta is None:
            return None
        if isinstance(delta, WeightDelta) or not (delta.overrides("forward") or delta.overrides("amend")):
            found = f"{self.of.name} does not add to an activation"
            raise GraftError(f"{self} at {site.key}", found, "choose a bottleneck or another edit of an output")
        return OrthoDelta(self, delta, len(part.sites))

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The stored form of the method inside: how it was trained is not part of what it computes."""
        within = Part(self.of, part.sites, part.anatomy)
        within.shared_modules = part.shared_modules
        within.deltas = {key: d.delta for key, d in part.deltas.items() if isinstance(d, OrthoDelta)}
        stored, tensors, shared = self.of.fold(within)
        return dataclasses.replace(stored, at=self.at, layers=self.layers), tensors, shared


class OrthoDelta(Delta):
    """delta: the one inside;  loss: its share of L_ORT in the last training pass."""

    def __init__(self, method: Ortho, delta: Delta, sites: int) -> None:
        super().__init__()
        self.delta, self.form, self.scale = delta, method.form, method.weight / sites
        self.source, self.reading, self.itself = delta.source, delta.reading, delta.itself
        self.loss: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss": None}  # a copy does not share the graph of the last pass

    def inner(self) -> list[Delta]:
        return [self.delta]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.noted(y, self.delta(x, y))

    def amend(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return self.noted(x, self.delta.amend(x, base))

    def enter(self, x: Tensor) -> Tensor:
        return self.delta.enter(x)

    def noted(self, x: Tensor, h: Tensor) -> Tensor:
        """h = x + a, of which a is compared with x in training."""
        learns = self.training and self.scale and any(p.requires_grad for p in self.delta.parameters())
        self.loss = self.scale * self.mean(cosine(x, h - x)) if learns else None
        return h

    def mean(self, cos: Tensor) -> Tensor:
        """The mean of cos^2 or |cos| over the tokens [batch, seq] that are no padding."""
        apart = cos.square() if self.form == "squared" else cos.abs()
        mask = self.runtime.mask
        if mask is None or mask.shape != apart.shape:
            return apart.mean()
        return (apart * mask).sum() / mask.sum().clamp(min=1)

    def auxiliary_loss(self) -> Tensor | None:
        own = self.delta.auxiliary_loss()
        return own if self.loss is None else self.loss if own is None else own + self.loss

    def overrides(self, function: str) -> bool:
        return self.delta.overrides(function)


def cosine(x: Tensor, a: Tensor) -> Tensor:
    """cos(x, a) [...] of vectors [..., d], 0 where one is 0; in float32 at least."""
    return F.cosine_similarity(x.float(), a.float(), dim=-1, eps=1e-8)


@preset("orthoadapters")
def OrthoAdapters(
    task: bool = False,
    weight: float = 1.0,
    mode: str = "alternating",
    reduction: int | None = None,
    coupling: str = "none",
) -> list[Method]:
    """A language adapter, or a task adapter on top of a frozen one, of MAD-X's layout with L_ORT (`ortho`).

    task: the task adapter.  reduction: d / m, 2 for a language and 16 for a task.  coupling: of MAD-X's invertible adapter, or "none".
    weight, mode: of L_ORT; weight=0 is the adapter without. All four combinations are to be tried: which is best depends on both.
    at: "mlp.norm", for post-norm backbones (BERT, XLM-R); for pre-norm ones give at="mlp".
    Parameters: L (2 d m + m + d).  Source: Vidoni et al. 2020, section 3.
    When: the published recipe of language and task adapters that are trained apart.
    """
    made = (
        get("mad_x_task")(reduction=reduction or 16)
        if task
        else get("mad_x_language")(reduction=reduction or 2, coupling=coupling)
    )
    of, *rest = flatten(made)
    return [Ortho(of=of, weight=weight, mode=mode), *rest]
