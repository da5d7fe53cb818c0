"""Sparse: an adapter whose matrices are pruned before training, by a mask that stays.

He et al. 2022, "SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters", arXiv
2210.04284; the scores are
those of SNIP (Lee et al. 2019), GraSP (Wang et al. 2020) and SynFlow (Tanaka et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, inner, number, positive
from graftwork.core.initial import drawing_from
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.sites.anatomy import Anatomy

from .inherit import Around
from .masked import Masked, MaskedDelta, MaskedWeight
from .scores import instant, keep, pooled


@method("sparse")
@dataclass(frozen=True)
class Sparse(Around):
    """W * M in the place of every matrix W of the method inside, M in {0, 1} fixed; vectors (biases, norms) are not
    masked.

    of: the method inside.  density: share rho of the entries that is kept, n - floor((1 - rho) n) of n.
    by: score z of an entry w, the largest are kept: "magnitude" |w| · "random" N(0, 1) · "snip" |w dL/dw|, summed
        over batches ·
        "grasp" w (H g), g = dL/dw (see `grasp_loss`) · "synflow" |w dR/dw| with |w| in the place of w (see
        `synflow_loss`).
        Magnitude and random are decided at once (a matrix that starts constant has no magnitudes: random); the others
        by gw.calibrate, before the optimiser is made. "snip" and "grasp" need matrices that do not start at zero (init="houlsby").
    scope: "global" ranks all matrices of the adapter together, "local" each by itself.
    rounds: E; round e of E keeps rho^(e/E) ("exponential" schedule) or 1 - (1 - rho) e/E ("linear"), scored with the
        mask so far;
        what is pruned stays so. Each round is a pass over the calibration batches.
    Large-Sparse: of=Bottleneck(d=k * m), density=1/k.  Stored: one bit per entry and the kept values.
    Parameters: those of the method inside less floor((1 - rho) n).
    When: a bottleneck or LoRA shall be pruned before training, to be smaller or (wider and sparse) better at the same count.
    """

    of: Method = inner("bottleneck")
    density: float = number(0.6, 0.0, 1.0)
    by: str = choice("magnitude", "magnitude", "random", "snip", "grasp", "synflow")
    scope: str = choice("global", "global", "local")
    rounds: int = positive(1)
    schedule: str = choice("exponential", "exponential", "linear")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density == 0:
            raise GraftError(f"Sparse(density={self.density})", "nothing would be kept", "keep more")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Calibration, where the scores come from data."""
        return ("calibrate",) if self.by in ("snip", "grasp", "synflow") and self.density < 1 else ()

    def build(self, site: Site, part: Part) -> Delta | None:
        delta = self.of.build(site, part)
        if isinstance(delta, WeightDelta):
            delta.place(site.key, site.weight)
        made = None if delta is None else (MaskedWeight if isinstance(delta, WeightDelta) else MaskedDelta)()
        if made is not None and delta is not None:
            made.setup(delta, decided=not self.needs)
        if site is part.sites[-1] and not self.needs:
            self.decide([*_masked(part), *([] if made is None else [made])])
        return made

    def decide(self, deltas: Sequence[Masked]) -> None:
        """All rounds of a score that needs no data."""
        for e in range(1, self.rounds + 1):
            self.prune(deltas, e, instant(deltas, self.by, self.scope))

    def share(self, e: int) -> float:
        """What round e of E keeps."""
        done = e / self.rounds
        return self.density**done if self.schedule == "exponential" else 1 - (1 - self.density) * done

    def prune(self, deltas: Sequence[Masked], e: int, scores: Sequence[dict[str, Tensor]]) -> None:
        """Set the masks of round e."""
        for group in pooled(deltas, scores, self.scope):
            keep(group, self.share(e), data=bool(self.needs))
        for delta in deltas:
            delta.settle(last=e == self.rounds)

    def calibrating(self, part: Part) -> None:
        for delta in _masked(part):
            delta.start(absolute=self.by == "synflow")

    def observe(self, part: Part, loss: Tensor) -> None:
        if self.by == "grasp":
            weights = [w for delta in _masked(part) for w in delta.matrices().values()]
            first = torch.autograd.grad(loss, weights, create_graph=True)
            product = torch.stack([(g * g.detach()).sum() for g in first]).sum()
            second = torch.autograd.grad(product, weights, retain_graph=True)
            products = iter(w.detach() * h for w, h in zip(weights, second, strict=True))
            for delta in _masked(part):
                delta.collect({name: next(products) for name in delta.matrices()})

    def calibrate(self, part: Part) -> None:
        for delta in _masked(part) if self.by != "grasp" else ():
            delta.collect({n: (w * w.grad).abs() for n, w in delta.matrices().items() if w.grad is not None})

    def calibrated(self, part: Part) -> bool:
        deltas = list(_masked(part))
        e = deltas[0].rounds + 1
        self.prune(deltas, e, [delta.scores for delta in deltas])
        return e < self.rounds

    def count_shared(self, sites: Sequence[Site]) -> int:
        with drawing_from(torch.Generator()):  # the shapes of the matrices are known when they are built
            scratch = Part(self.of, sites, Anatomy("", tuple(sites), ()))
            built = [self.of.build(site, scratch) for site in sites]
        sizes = [p.numel() for d in built if d is not None for p in d.parameters() if p.dim() > 1]
        groups = [sum(sizes)] if self.scope == "global" else sizes
        return self.of.count_shared(sites) - sum(int((1 - self.density) * n + 1e-9) for n in groups)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        tensors = {key: delta.folded() for key, delta in part.deltas.items() if isinstance(delta, Masked)}
        return self, tensors, dict(part.shared_modules.state_dict())


def _masked(part: Part) -> Iterator[Masked]:
    return (delta for delta in part.deltas.values() if isinstance(delta, Masked))
