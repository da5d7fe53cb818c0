"""Turning a task's generated adapter into a plain one."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ..combinators.generated import Generated
from ..combinators.hypernetwork import GeneratedDelta, GeneratedWeight
from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..grafting.graft import find, graft


@torch.no_grad()
def materialise(model: nn.Module, name: str, task: str, into: str | None = None) -> Adapter:
    """A new adapter, active, of plain deltas that compute what the generated ones do for `task`. into: its name
    ("name-task").

    The other methods of the adapter (trained norms, a head) come with copies of their values.
    """
    source = find(model, name)
    if not any(isinstance(m, Generated) for m in source.methods):
        raise GraftError(f"materialise {name!r}", f"{source!r} generates nothing", "name an adapter of gw.Generated")
    plain = [
        dataclasses.replace(m.of, at=m.at, layers=m.layers) if isinstance(m, Generated) else m for m in source.methods
    ]
    for delta in source.deltas():
        if isinstance(delta, GeneratedDelta | GeneratedWeight):
            delta.task(task)  # refuse an unknown task before anything is grafted
    made = graft(model, plain, into or f"{name}-{task}", head=False)
    for old, new in zip(source.parts, made.parts, strict=True):
        new.shared_modules.load_state_dict({} if isinstance(old.method, Generated) else old.shared_modules.state_dict())
        for key, delta in new.deltas.items():
            given = old.deltas[key]
            generated = isinstance(given, GeneratedDelta | GeneratedWeight)
            values = given.generate(task) if generated else given.state_dict()  # type: ignore[operator]
            delta.restore({name: value.detach().clone() for name, value in values.items()})
    made.labels = source.labels
    return made
