"""The graft of the model itself: the registry of its adapters, what is active, and what was before."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.grafted import Graft, armed
from ..core.passes import Runtime
from ..sites.body import Body
from .clock import Clock


class Root(Graft):
    """The graft of the model itself: the registry of its adapters and what is active."""

    def __init__(self, runtime: Runtime, body: Body) -> None:
        super().__init__(runtime)
        self.body = body
        self.mask_at: int | None = None  # position of attention_mask in the model's forward
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.expression: str | None = None
        self.armed: list[nn.Module] = []
        self.hosts: list[
            tuple[nn.Module, str, nn.Module]
        ] = []  # of what is active: (the module around it, its name there, itself)
        self.thawed: list[str] = []  # names of parameters that were trainable before the first graft
        self.kept: list[
            tuple[nn.Module, str, nn.Parameter | None]
        ] = []  # (module, parameter name, its value before merging)
        self.merged: str | None = None
        self.opened: list[nn.Module] = []  # quantised layers that the first graft found in their form for inference
        self.clock = Clock()
        self.checked = False  # a whole pass has shown which of the active plans are reached
        self.statistics: set[str] = set()  # paths of modules with running statistics, which stay the backbone's
        self.own_labels: tuple[dict[int, str], dict[str, int], int | None] | None = None

    def expect(self, paths: Iterable[str]) -> None:
        """These modules are adapted: they must stay where they are."""
        ends = [path.rpartition(".") for path in paths if path]
        self.hosts = [(self.body.modules[up], name, self.body.modules[up + dot + name]) for up, dot, name in ends]

    def look(self, model: nn.Module) -> None:
        """Before a pass: where a module that is adapted was replaced (transformers' resized output layer), read the model again.

        GraftError where that has thrown away a part of an adapter.
        """
        if torch.compiler.is_compiling() or all(around._modules.get(name) is m for around, name, m in self.hosts):
            return
        from .graft import activate

        wrapped = [host for host in self.hosts if _wraps(*host)]  # torch.compile of a part: it is called as before
        self.hosts = [host for host in self.hosts if host not in wrapped]
        gone = {name: m for around, name, m in self.hosts if around._modules.get(name) is not m}
        if not gone:
            return
        if kept := [name for name, m in gone.items() if "graft" in m._modules]:
            do = "replace it (resize_token_embeddings) before grafting, or remove the adapter first"
            raise GraftError("a pass through the adapted model", f"{kept[0]!r} was replaced by another module", do)
        self.body = Body(model)
        activate(model, self.expression)

    def begin(self, training: bool) -> None:
        """The model itself was called."""
        if training and not torch.compiler.is_compiling():
            self.clock.tick()
            if torch.is_grad_enabled():
                for name in self.active:
                    for part in self.adapters[name].parts:
                        part.method.begin(part)

    def end(self) -> None:
        """The model's call is over."""
        if not self.checked and not torch.compiler.is_compiling():
            self.checked = True
            self._check_reached()

    def _check_reached(self) -> None:
        """Warn where the pass never called a module whose activations are adapted: its weight may be read, but not its output."""
        plans = [r.plan for m in self.armed if (r := armed(m)) is not None and r.plan is not None and not r.reached]
        missed = [d for plan in plans for d in [f[0] for f in plan.forward] + plan.attend + plan.around + plan.amend]
        gone = tuple(path + mark for path in self.runtime.left_out for mark in ".:")
        missed = [d for d in missed if not d.key.startswith(gone)]
        if missed:
            warnings.warn(
                f"{len(missed)} deltas had no effect in this pass, {missed[0].key} first: the model never calls that module "
                "(it may read its weight). Choose another `at`, or a method of weights such as lora",
                stacklevel=2,
            )


def _wraps(around: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether something else stands in the module's place that holds it."""
    now = around._modules.get(name)
    return now is not None and now is not module and any(m is module for m in now.modules())


def root_of(model: nn.Module) -> Root:
    """The registry of a grafted model. GraftError where nothing is grafted."""
    found = graft_in(model)
    if not isinstance(found, Root):
        raise GraftError(
            f"the adapters of {type(model).__name__}", "nothing is grafted on it", "call gw.graft or gw.load first"
        )
    return found


def body_of(model: nn.Module) -> Body:
    """The reading of the backbone: the one that a grafted model keeps, while it holds."""
    if not is_grafted(model):
        return Body(model)
    root = root_of(model)
    if not root.body.holds():
        root.body = Body(model)
    return root.body


def is_grafted(model: nn.Module) -> bool:
    """Whether the model carries adapters."""
    return isinstance(graft_in(model), Root)


def graft_in(module: nn.Module) -> object:
    """What a module holds under the name "graft": its child of that name, or (the model's own) a loose one, or None."""
    return module._modules.get("graft", module.__dict__.get("graft"))
