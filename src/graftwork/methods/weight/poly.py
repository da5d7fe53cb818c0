"""Poly: tasks share an inventory of low-rank skills, and each learns which of them it is made of.

Ponti et al. 2022, "Combining Modular Skills in Multitask Learning" (Polytropon), arXiv 2202.13914, eq. 1-6;
Caccia et al. 2023, "Multi-Head Adapter Routing for Cross-Task Generalization" (MHR: splits > 1), arXiv 2211.03831;
microsoft/mttl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.fields import count, flag, number, positive, rank, where, words
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.allocation import Router
from .forms.skills import Skills


@method("poly")
@dataclass(frozen=True)
class Poly(Method):
    """W' = W + (1/r) B_t A_t for the task t: A_t, B_t = sum_s w_s A_s, sum_s w_s B_s,  w = z / sum_s z.  Identity at init (B = 0).

    In evaluation z = sigmoid(Z_t), in training z ~ RelaxedBernoulli(tau, Z_t), drawn for each row of the batch and each site.
    The factors are mixed, and multiplied then: with w = (1/2, 1/2) the update is (B_1 + B_2)(A_1 + A_2) / 4r.
    splits: q; the inputs of A and the outputs of B are cut into q heads with a Z each (MHR); must divide both widths.
    tasks: names; gw.context(model, task="mnli") says the batch's one, a list of names or a tensor of their numbers that of
        each row (axis 0; entries that became several, as beams do, follow one another). One task alone needs no word.
    shared: one Z for all sites.  stochastic: False takes the sigmoid in training, too.
    allocation: for each task a text of 0 and 1, its skills, in the place of a learned Z: ("10", "01") is private LoRAs; one
        skill is one LoRA for all.
    prior: weight of -log p(Z) under the Indian-buffet process in gw.auxiliary_loss.
    router_lr: learning rate of Z as a multiple of the factors' (Polytropon: 100), in `adapter.groups(lr)` and graftwork train.
    frozen: the skills and the rows of the first so many tasks stay as they are; only the rows of the others train.
    A new task: gw.add_task(model, "z", "multi", "qa", tune="router") is MHR-z; gw.mean_skill(model, "mu", "multi") MHR-mu.
    Mergeable for one task, as it is in evaluation: gw.context(model, task="mnli"), then gw.merge(model); and with it
    gw.combine(model, "plain", {"multi": 1.0}) is its LoRA, exactly.
    Init: A_s kaiming-uniform (a = sqrt 5) per head, B zero, Z U(-1e-3, 1e-3).
    Parameters: skills r (in + out) + tasks splits skills per weight.
    When: several tasks with labels are trained together and new ones adapted from few rows: skills are shared by learned
        allocation.
    """

    r: int = rank(8)
    skills: int = positive(4)
    splits: int = positive(1)
    tasks: tuple[str, ...] = words(("default",))
    shared: bool = flag(False)
    stochastic: bool = flag(True)
    tau: float = number(1.0, low=1e-3)
    allocation: tuple[str, ...] = words()
    prior: float = number(0.0, low=0.0)
    router_lr: float = number(1.0, low=0.0)
    frozen: int = count(0)
    at: str = where("q, k, v, o | linear")

    mergeable = True
    mixes_tasks = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise GraftError(f"Poly(tasks={self.tasks!r})", "no task, or one twice", "name each task once")
        if self.frozen >= len(self.tasks):
            found = f"{len(self.tasks)} tasks, of which none is left to train"
            raise GraftError(f"Poly(frozen={self.frozen})", found, "add the new tasks behind the frozen ones")
        fitting = len(self.allocation) in (0, len(self.tasks)) and all(
            len(row) == self.skills and set(row) <= {"0", "1"} and "1" in row for row in self.allocation
        )
        if not fitting or (self.allocation and (self.shared or self.prior or self.frozen)):
            do = f"give {len(self.tasks)} texts of {self.skills} marks, 1 for a skill of the task, and no shared, prior, frozen"
            raise GraftError(f"Poly(allocation={self.allocation!r})", "no allocation of these skills", do)

    def build(self, site: Site, part: Part) -> Skills:
        w = site.weight
        if not w.linear:
            found = f"{type(site.module).__name__}.{w.name}, a weight that is not applied row by row"
            raise GraftError(f"{self} at {site.key}", found, "choose linear layers")
        if w.d_in % self.splits or w.d_out % self.splits:
            found = f"a weight of {w.d_out} x {w.d_in}, which {self.splits} heads do not divide"
            raise GraftError(f"{self} at {site.key}", found, "choose splits that divide both")
        common = part.shared("router", lambda: Router(self, w.like)) if self.shared else None
        return Skills(self, site, common, self.prior if not self.shared or not part.deltas else 0.0)

    def rate(self, tensor: str) -> float:
        return self.router_lr if tensor.endswith("logits") else 1.0

    def _rows(self) -> int:
        return 0 if self.allocation else (len(self.tasks) - self.frozen) * self.splits * self.skills

    def count(self, site: Site) -> int:
        w = site.weight
        factors = 0 if self.frozen else self.skills * self.r * (w.d_in + w.d_out)
        return factors + (0 if self.shared else self._rows())

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self._rows() if self.shared else 0
