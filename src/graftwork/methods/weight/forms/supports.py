"""The delta of `glora`: the support tensors of one weight, in a supernet those that are chosen among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.initial import tensor
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.products.lowrank import low_rank, whole_update

from .views import KINDS, Choice, Support

if TYPE_CHECKING:
    from ..glora import GLoRA


class Supports(WeightDelta):
    """support: the tensors.  choice: of a supernet, None until it is made;  drawn: that of the last training pass."""

    lasting = True
    chosen: Tensor  # the choice as numbers, which are stored; -1 for none

    def __init__(self, method: GLoRA, site: Site) -> None:
        super().__init__()
        self.support = Support()
        self.support.fill(site.weight, method.kinds, method.r, method.biased(site))
        self.kinds, self.supernet = method.kinds, method.supernet
        self.choice: Choice | None = None
        self.drawn: Choice | None = None
        self.additive = method.a == method.d == "none"
        if self.supernet:
            self.register_buffer("chosen", tensor((5,), lambda t, g: t.fill_(-1)))
        self.host = Host(site.module, site.weight, first=False)  # W C is of the backbone's own W

    def choose(self, choice: Choice | None) -> None:
        """Of a supernet: this is what acts from now on; None: what it draws."""
        self.choice = choice
        numbers = [options.index(kind) for options, kind in zip(KINDS.values(), choice or (), strict=False)]
        self.chosen = torch.tensor(numbers or [-1] * 5, dtype=self.chosen.dtype, device=self.chosen.device)

    @property
    def now(self) -> Choice:
        """The kinds that act in this pass."""
        return self.choice or (self.drawn if self.training and self.drawn else self.kinds)

    def weight(self, w: Tensor) -> Tensor:
        a, b = self.support.matrix("a", self.now.a), self.support.matrix("b", self.now.b)
        out = w if a is None else w + w * a
        return out if b is None else out + b

    def bias(self, b: Tensor | None) -> Tensor | None:
        c, d, e = self.support.matrix("c", self.now.c), *(self.support.vector(n, getattr(self.now, n)) for n in "de")
        out = b if b is None or d is None else b + d * b
        for term in (None if c is None else (self.host.weight.to(c.dtype) @ c.contiguous())[..., 0], e):
            if term is not None:
                term = term.expand(*self.view.batch, self.view.d_out)
                out = term if out is None else out + term
        return out

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """(down, up) with B = up down."""
        found = self.support.pair("b", self.now.b)
        if found is None:
            return None
        up, down = found
        if down is None:  # the same for all inputs
            return up.new_ones(1, self.view.d_in), up.contiguous().expand(self.view.d_out, 1)
        return down, up

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        a, pair = self.support.matrix("a", self.now.a), self.pair()
        own, b = host.bias, self.bias(host.bias)
        if a is not None and a.shape[-1] > 1:
            y = whole_update(x, base, host, host.weight * a if pair is None else host.weight * a + pair[1] @ pair[0])
        elif a is None and pair is not None:
            y = low_rank(x, base, host, *pair, 1.0)
        else:
            y = base(x)
            if a is not None:
                gain = 1 + a[:, 0]
                y, own = y * gain.to(y.dtype), None if own is None else own * gain
            if pair is not None:
                y = y + F.linear(F.linear(x, pair[0].to(x.dtype)), pair[1].to(x.dtype))
        if b is own or b is None:
            return y
        return y + (b if own is None else b - own).to(y.dtype)

    def overrides(self, function: str) -> bool:
        return set(self.kinds[2:]) != {"none"} if function == "bias" else super().overrides(function)

    def work(self) -> int:
        size = math.prod(self.view.shape)  # W * A and W C, once a call
        return size * ((self.now.a == "lora") + (self.now.c != "none"))

    def stored(self) -> dict[str, Tensor]:
        """The tensors that the choice needs, in its sizes; all of them where there is none."""
        if self.choice is None:
            return dict(self.state_dict())
        return {"chosen": self.chosen, **{f"support.{n}": t for n, t in self.support.used(self.choice).items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take stored tensors; those of a choice are fewer and smaller."""
        numbers = [int(n) for n in tensors["chosen"].flatten()] if self.supernet and "chosen" in tensors else []
        if any(n >= 0 for n in numbers):
            if len(numbers) != 5 or any(not 0 <= n < len(o) for n, o in zip(numbers, KINDS.values(), strict=True)):
                at = getattr(self, "key", "a supernet")
                raise GraftError(f"the choice at {at}", f"the kinds {numbers}", "restore the file")
            self.choose(Choice(*(o[n] for n, o in zip(numbers, KINDS.values(), strict=True))))
            if tensors.keys() != self.state_dict().keys() or any(
                tensors[n].shape != t.shape for n, t in self.state_dict().items()
            ):
                for name, view in (sizes := self.support.used(self.choice)).items():  # type: ignore[arg-type]
                    self.support[name] = nn.Parameter(view.clone(), self.support[name].requires_grad)
                for name in self.support.keys() - sizes.keys():
                    del self.support[name]
        super().restore(tensors)
