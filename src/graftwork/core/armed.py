"""What a module carries while its class is swapped: its plan, and what holds during one call of it.

A plain object in the module's dictionary, not a child and not its attributes: setting an attribute of an `nn.Module` costs more than
the call of a small delta.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import intercept, uses_interface
from .passes import Runtime
from .plan import Plan
from .quantised import product

if TYPE_CHECKING:
    from ..grafting.root import Root


class Armed:
    """The record of one armed module; one without a plan opens the pass for the sites below it.

    root: the registry, where the module is the model itself;  overriding: the module's attributes in OVERRIDES read as there;
    reached: the module was called since its plan was made;  cache: adapted parameters during one call of the host;
    plain: its parameters read as they are stored;  attending: its attention call is caught;  called: with what, while it is.
    plans: those of the branches of `a | b`, of which `plan` is the one that runs, or the only one.
    below: it has no adapter in any branch, and may be called before the first one.
    """

    __slots__ = (
        "attending",
        "below",
        "cache",
        "called",
        "overriding",
        "plain",
        "plan",
        "plans",
        "reached",
        "root",
        "runtime",
    )

    def __init__(self, runtime: Runtime, root: Root | None) -> None:
        self.runtime, self.root = runtime, root
        self.follow((None,), overriding=False)

    def follow(self, plans: tuple[Plan | None, ...], overriding: bool, below: bool = False) -> None:
        """Take the plan of each branch, which no pass has reached yet."""
        self.plans, self.plan = plans, plans[0]
        self.overriding, self.below, self.reached = overriding, below, False
        self.cache: dict[str, Tensor | None] | None = None
        self.plain = self.attending = False
        self.called: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __getstate__(self) -> dict[str, Any]:
        kept = ("runtime", "root", "plan", "plans", "overriding", "below", "reached")  # a copy starts outside any call
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.cache, self.plain, self.attending, self.called = None, False, False, ((), {})
        for name, value in state.items():
            setattr(self, name, value)

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The armed module's forward; `forward` is that of its own class, unbound."""
        runtime, plan = self.runtime, self.plan
        if runtime.branches is not None and not runtime.running and self.root is None:
            raise runtime.branches.by_itself(module)
        # a part that is called by itself (the encoder, by `generate`) begins a pass too, unless it is run again backwards
        if not runtime.running and (self.root is not None or not runtime.open):
            return self._pass(module, forward, args, kwargs)
        if plan is None:
            if self.below and runtime.branches is not None:
                return runtime.branches.once(module, forward, args, kwargs)
            if runtime.branches is not None and any(other is not None for other in self.plans):
                runtime.branches.apart = True  # another branch has an adapter here
            return forward(module, *args, **kwargs)
        self.reached = True
        if runtime.branches is not None:
            runtime.branches.apart = True
        if plan.attend:
            return self._attend(module, plan, forward, args, kwargs)
        keeping = plan.keeps and self._keeping(module, plan)
        if plan.rowwise or (plan.linear and not keeping):  # what stands in for the adapted weight calls the plain host
            return plan.run(partial(self._plainly, module, forward), runtime, True, args, kwargs)
        whole = product if plan.decodes else forward
        before = self.cache
        self.cache = {name: plan.kept(module, name) for name in plan.weights} if keeping else {}
        try:
            return plan.run(partial(whole, module), runtime, False, args, kwargs)
        finally:
            self.cache = before

    def _plainly(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module without its adapted weights."""
        before, self.plain = self.plain, True
        try:
            return forward(module, *args, **kwargs)
        finally:
            self.plain = before

    def _pass(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The outermost call: a pass."""
        runtime, root = self.runtime, self.root
        if root is not None:
            root.look(module)
        mask = kwargs.get("attention_mask")
        if root is not None and mask is None and root.mask_at is not None and len(args) > root.mask_at:
            mask = args[root.mask_at]
        rows = runtime.rows
        if rows is not None:
            rows.begin(module.training, args, kwargs)
        seen = mask if root is not None or (mask is not None and mask.dim() == 2) else None
        runtime.begin(seen, kwargs.get("past_key_values"), module.training)
        if root is not None:
            root.begin(module.training)
        runtime.running = True
        try:
            if rows is not None and rows.unknown:
                rows.look(module, partial(self.run, module, forward), args, kwargs)
            if runtime.branches is None:
                out = self.run(module, forward, args, kwargs)
            else:

                def one(given: dict[str, Any]) -> Any:
                    runtime.state = {}
                    return self.run(module, forward, args, given)

                out = runtime.branches.run(one, kwargs, bool(runtime.generating))
        finally:
            runtime.running = False
            runtime.end()
        if root is not None:
            root.end()
        return out

    def _attend(
        self,
        module: nn.Module,
        plan: Plan,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self.cache, self.attending, self.called = {}, uses_interface(module), (args, kwargs)
        try:
            with intercept(module, plan.attend):
                return plan.run(partial(forward, module), self.runtime, False, args, kwargs)
        finally:
            self.cache, self.attending, self.called = None, False, ((), {})

    def _keeping(self, module: nn.Module, plan: Plan) -> bool:
        """Whether this pass uses weights that are kept between passes; one that trains frees them."""
        if torch.compiler.is_compiling():
            return False
        if self.runtime.keeps_weights and not module.training and not torch.is_grad_enabled():
            return True
        plan.drop_kept()
        return False

    def read(self, module: nn.Module, name: str) -> Tensor | None:
        """The value of the host's parameter `name`: adapted inside a pass, plain outside of one."""
        if self.cache is not None and name in self.cache:
            return self.cache[name]
        stored = module._parameters[name]
        plan = self.plan
        if plan is None or self.plain or name not in plan.weights or not self.runtime.open:
            return stored
        if self.runtime.branches is not None:
            self.runtime.branches.apart = True
        keeping = plan.keeps and self._keeping(module, plan)
        value = plan.kept(module, name) if keeping else plan.adapted(module, name)
        if self.cache is not None:
            self.cache[name] = value
        return value
