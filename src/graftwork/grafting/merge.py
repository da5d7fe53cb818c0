"""Writing the active adapters into the backbone's weights, and taking them out again to the bit."""

from __future__ import annotations

import torch
from torch import nn

from ..core.delta import WeightDelta
from ..core.errors import GraftError
from ..core.plan import Plan
from ..expressions.algebra import as_expr
from ..expressions.mixing import mixed_names, resolved
from . import install, labels
from .graft import activate, active


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Write what is active into the weights; the model then runs its own code. The replaced tensors are kept for `unmerge`.

    A weight that is shared (tied) with a module that is not adapted alike gets a tensor of its own first.
    Raises GraftError, with nothing changed, where a method cannot be merged.
    """
    root = install.root_of(model)
    if root.merged is not None:
        raise GraftError("merge", f"{root.merged} is merged already", "call gw.unmerge first")
    expression = active(model)
    if expression is None:
        raise GraftError("merge", "no adapter is active", "call gw.activate first")
    if root.runtime.branches is not None:
        raise GraftError(f"merge {expression}", "a weight is one for all branches", "activate one branch, then merge")
    if root.runtime.rows is not None:
        raise GraftError(f"merge {expression}", "a weight is the same for all rows", "activate one adapter, then merge")
    if mixed_names(resolved(as_expr(expression), root.adapters)):
        found = "a weight is the same for all tokens, and a mixture is not"
        raise GraftError(f"merge {expression}", found, "activate one adapter, or a sum, then merge")
    for name in root.active:
        for part in root.adapters[name].parts:
            for delta in part.deltas.values():
                if not (isinstance(delta, WeightDelta) and part.method.mergeable and delta_mergeable(delta)):
                    raise GraftError(
                        f"merge {expression}",
                        f"{part.method.name} at {delta.key} changes activations, not a weight",
                        f"activate only methods that can be merged, or run {name!r} unmerged",
                    )
                if delta.training and delta.overrides("forward"):
                    found = f"{part.method.name} at {delta.key} is in training, where it is no weight (batch statistics, dropout)"
                    raise GraftError(f"merge {expression}", found, "call model.eval() first")
                if delta.view.codes is not None and delta.view.name in delta.names():
                    raise GraftError(
                        f"merge {expression}",
                        f"the backbone holds the weight of {delta.key} quantised, and would round what is written into it",
                        f"save {name!r} (gw.save), load it on the backbone loaded unquantised, and merge there",
                    )
    merged: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    for module in root.armed:
        plan: Plan | None = module._armed.plan  # type: ignore[union-attr, assignment]
        for parameter, chain in plan.weights.items() if plan else ():
            stored = module._parameters[parameter]
            value: torch.Tensor | None = stored
            for delta in chain:
                value = delta.adapted(parameter, value)
            if value is not None and not torch.isfinite(value).all():
                raise GraftError(
                    f"merge {expression}", f"a number that is not finite at {chain[0].key}", "train it again"
                )
            new = (
                None
                if value is None
                else nn.Parameter(value.to(stored.dtype if stored is not None else value.dtype), False)
            )
            merged.append((module, parameter, new))
    shown = next((a.labels for name in root.active if (a := root.adapters[name]).labels), None)
    activate(model, None)
    labels.apply(model, shown)
    for module, parameter, new in merged:
        root.kept.append((module, parameter, module._parameters[parameter]))
        module._parameters[parameter] = new
    root.merged = expression


def delta_mergeable(delta: WeightDelta) -> bool:
    """Whether this delta, as it stands, is a change of weights and nothing else."""
    return not any(delta.overrides(function) for function in ("attend", "around", "enter", "amend")) and bool(
        delta.names()
    )


def unmerge(model: nn.Module) -> None:
    """Put the kept tensors back, and activate what was merged. The weights are bit for bit what they were."""
    root = install.root_of(model)
    if root.merged is None:
        raise GraftError("unmerge", "nothing is merged", "call gw.merge first")
    for module, parameter, old in reversed(root.kept):
        module._parameters[parameter] = old
    root.kept = []
    expression, root.merged = root.merged, None
    activate(model, expression)


def forget(model: nn.Module) -> None:
    """Keep the merged weights for good: the adapters and the way back go, a plain model stays."""
    root = install.root_of(model)
    if root.merged is None:
        raise GraftError("forget the adapters", "nothing is merged", "call gw.merge first")
    root.kept, root.merged = [], None
    for name in list(root.adapters):
        install.uproot(model, name)
