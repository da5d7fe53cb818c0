"""What becomes of an inventory of skills (`poly`): one more task, or the mean of the skills as a plain LoRA.

Caccia et al. 2023, "Multi-Head Adapter Routing for Cross-Task Generalization", arXiv 2211.03831, section 4 (MHR-z, MHR-mu).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.method import Method
from ..methods.weight.forms.allocation import Router
from ..methods.weight.forms.skills import Skills
from ..methods.weight.lora import LoRA
from ..methods.weight.poly import Poly
from .turned import Turn, turned

Tensors = dict[str, Tensor]


@torch.no_grad()
def add_task(
    model: nn.Module, name: str, of: str, task: str, *, tune: str = "all", start: str = "random", seed: int = 0
) -> Adapter:
    """A new adapter, active and trainable, of the skills and the tasks of the `poly` adapter `of`, and one more task.

    tune: "all" trains skills and allocations; "router" the allocation of the new task alone, splits x skills numbers per weight:
        the rest stays as it is to the bit (MHR-z).
    start: Z of the new task is "random", U(-1e-3, 1e-3) from `seed`, or the "mean" of the other tasks'.
    Train it with gw.context(model, task=task). Other methods of the adapter (a head) come with copies of their values, and
    train. `of` stays as it is.
    Raises GraftError, with the model as it was, for a task that is there, and for an adapter without a learned allocation.
    """
    asked = f"add the task {task!r} to {of!r}"
    if tune not in ("all", "router") or start not in ("random", "mean"):
        found, do = f"tune={tune!r}, start={start!r}", 'give tune="all" or "router", start="random" or "mean"'
        raise GraftError(asked, found, do)

    def more(method: Poly) -> Method:
        if method.allocation or task in method.tasks:
            found = "its allocation is given, not learned" if method.allocation else f"it has {', '.join(method.tasks)}"
            raise GraftError(asked, found, "give a task that is new to an adapter which learns its allocations")
        frozen = len(method.tasks) if tune == "router" else 0
        return replace(method, tasks=(*method.tasks, task), frozen=frozen)

    def grown(old: Router, new: Router) -> Tensors:
        last = old.table.mean(0, keepdim=True) if start == "mean" else new.table[-1:]
        if new.known is not None:
            return {"known": old.table, "logits": last}
        return {"logits": torch.cat([old.table, last])}

    def values(old: Skills, new: nn.Module) -> Tensors:
        own = {"down": old.down, "up": old.up}
        if old.router is None:
            return own
        return own | {f"router.{n}": t for n, t in grown(old.router, new.router).items()}  # type: ignore[arg-type]

    def shared(old: nn.ModuleDict, new: nn.ModuleDict) -> None:
        if "router" in old:
            new["router"].load_state_dict(grown(old["router"], new["router"]))  # type: ignore[arg-type]

    return turned(model, name, of, asked, Turn(Poly, "skills", more, values, shared), seed)


@torch.no_grad()
def mean_skill(model: nn.Module, name: str, of: str) -> Adapter:
    """A new adapter, active and trainable, with the mean of the skills of the `poly` adapter `of` as a plain LoRA (MHR-mu).

    A = mean_s A_s, B = mean_s B_s, head by head; s = 1/r. It is what the skills are for a task that takes all alike, exactly.
    Other methods of the adapter (a head) come with copies of their values.
    Raises GraftError, with the model as it was, for an adapter without skills.
    """

    def plain(method: Poly) -> Method:
        return LoRA(r=method.r, alpha=1.0, at=method.at, layers=method.layers)

    def values(old: Skills, new: nn.Module) -> Tensors:
        down, up = old.down.mean(1), old.up.mean(1)  # [splits, r, in / splits], [splits, out / splits, r]
        return {"down": down.transpose(0, 1).flatten(1), "up": up.flatten(0, 1)}

    return turned(model, name, of, f"the mean skill of {of!r}", Turn(Poly, "skills", plain, values), 0)
