"""The delta of DyT: a dispatcher and an adapter beside a feed-forward (see `dyt`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.initial import parameter, uniform
from graftwork.core.plan import first_output, first_tensor, reading, replace_first, replace_output
from graftwork.core.site import Site

from ...activation.forms.residual import Residual

if TYPE_CHECKING:
    from ..dyt import DyT


class Rates(nn.Module):
    """What the dispatchers of an adapter have in common: their number, and the mean of M of each, by key, in the last training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "of": {}}  # a copy does not share the graph of the last pass


class Dispatch(Delta):
    """weight = w [1, width], bias = b [1]; adapter."""

    source = "norm"

    def __init__(self, method: DyT, site: Site, adapter: Residual, rates: Rates) -> None:
        super().__init__()
        near, like = uniform(-(site.d**-0.5), site.d**-0.5), site.like
        self.weight = parameter((1, site.d), near, like)
        self.bias = parameter((1,), near, like)
        self.adapter, self.method = adapter, method
        self._rates = (rates,)  # not a child: it is stored, and trained, as a shared module
        self.cached = site.tower in ("", "decoder", "text")

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        captured = self.runtime.state.get(self, (None, 0))
        x, given = reading(self, None, self.runtime), first_tensor(args, kwargs)
        if x.dim() < 3 or given.shape[:-1] != x.shape[:-1]:
            found = f"states {list(x.shape)} in front of the norm, {list(given.shape)} behind it"
            raise GraftError(
                f"the tokens at {self.key}", found, "choose layers whose states are [batch, tokens, width]"
            )
        if self.context("complete", False):
            return self._edited(base(*args, **kwargs), x, None)
        mask = self.mask(x, self.always(*captured))
        if self.training or torch.compiler.is_compiling():
            return self._edited(base(*args, **kwargs), x, mask[..., None])
        kept = mask.bool()

        def take(t: Tensor) -> Tensor:
            return t[kept].view(*[1] * (t.dim() - 2), -1, t.shape[-1])

        args, kwargs = replace_first(args, kwargs, given, take(given))
        out = self.runtime.run_part(take, base, *args, **kwargs)
        some = first_output(out)
        every = some.new_zeros(*x.shape[:-1], some.shape[-1])
        every[kept] = some.flatten(0, -2)
        return self._edited(every if isinstance(out, Tensor) else replace_output(out, every), x, None)

    def inner(self) -> list[Delta]:
        return [self.adapter]

    def mask(self, x: Tensor, always: Tensor) -> Tensor:
        """M [batch, ...] for the residual stream x [batch, ..., width]; in training its gradient is that of the sigmoid.

        always [batch, ...]: the tokens that are not decided.
        """
        m = self.method
        logit = F.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(x.shape[:-1]).float()
        if not self.training:
            return (logit.sigmoid() > m.threshold).masked_fill(always, True).to(x.dtype)
        if m.stochastic:
            first, second = torch.empty_like(logit).exponential_(), torch.empty_like(logit).exponential_()
            logit = logit - first.log() + second.log()  # -log of an exponential is Gumbel's
        soft = (logit / m.tau).sigmoid()
        hard = (soft > m.threshold).to(soft.dtype) + (soft - soft.detach())  # the last is zero, to the bit
        if torch.is_grad_enabled():
            self._rates[0].of[self.key] = (hard * ~always).sum() / (~always).sum().clamp(min=1)
        return hard.masked_fill(always, 1.0).to(x.dtype)

    def always(self, x: Tensor, depth: int) -> Tensor:
        """Which tokens are not decided: the first of each row, those in a key-value cache included.

        x: states of all tokens, captured at this depth of the parts that are taken of them.
        """
        shape = x.shape[1:-1]
        place = torch.arange(shape.numel(), device=x.device) + (self.runtime.past if self.cached else 0)
        first = (place < self.method.keep).view(1, *shape, 1).expand(*x.shape[:-1], 1)
        return self.runtime.part(first, depth)[..., 0]

    def _edited(self, out: Any, x: Tensor, mask: Tensor | None) -> Any:
        y = first_output(out)
        y = (y if mask is None else y * mask) + self.adapter.branch(x)
        return y if isinstance(out, Tensor) else replace_output(out, y)

    def auxiliary_loss(self) -> Tensor | None:
        """alpha (mean rate - target)^2, told once for all layers: by the first that ran."""
        rates = self._rates[0].of
        if not rates or next(iter(rates)) != self.key:
            return None
        return self.method.alpha * (torch.stack([*rates.values()]).mean() - self.method.target).square()
