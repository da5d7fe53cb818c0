"""The delta of `poly`: factors mixed for each task, or for each row of a batch, and multiplied then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.initial import Initial, kaiming_uniform, tensor, zeros
from graftwork.core.plan import Host
from graftwork.core.site import Site
from graftwork.core.tasks import each_row, tasks_of
from graftwork.products.lowrank import low_rank

from .allocation import Router, log_prior

if TYPE_CHECKING:
    from ..poly import Poly


class Skills(WeightDelta):
    """down = A [splits, skills, r, in / splits], up = B [splits, skills, out / splits, r]; its own router, or the common one."""

    additive = True

    def __init__(self, method: Poly, site: Site, common: Router | None, prior: float) -> None:
        super().__init__()
        w, heads = site.weight, (method.splits, method.skills)

        def hold(name: str, rows: int, columns: int, init: Initial) -> None:
            made = tensor((*heads, rows, columns), init, w.like)
            if method.frozen:
                self.register_buffer(name, made)
            else:
                self.register_parameter(name, nn.Parameter(made))

        hold("down", method.r, w.d_in // method.splits, kaiming_uniform())
        hold("up", w.d_out // method.splits, method.r, zeros)
        self.router = Router(method, w.like) if common is None else None
        # in a tuple: it hangs at the model's root, once
        self._common: tuple[Router, ...] = () if common is None else (common,)
        self.names_of_tasks, self.stochastic = method.tasks, method.stochastic
        self.scale, self.prior = 1 / method.r, prior

    down: Tensor
    up: Tensor

    @property
    def allocation(self) -> Router:
        """The router of this site."""
        return self.router if self.router is not None else self._common[0]

    def sources(self) -> Iterator[nn.Module]:
        yield from (self, *self._common)

    def mixed(self, tasks: int | Tensor, draws: int | None = None) -> tuple[Tensor, Tensor]:
        """(A_t [r, in], B_t [out, r]) of one task; with rows in front of tasks [rows], or of as many draws."""
        w = self.allocation(tasks, draws, self.down.device).to(self.down.dtype)
        down = torch.einsum("...qs,qsri->...rqi", w, self.down).flatten(-2)
        return down, torch.einsum("...qs,qsor->...qor", w, self.up).flatten(-3, -2)

    @property
    def drawing(self) -> bool:
        """Whether this pass draws its allocations. What is merged is never drawn."""
        return self.training and self.stochastic and not self.allocation.fixed and self.runtime.open

    def one_task(self) -> int:
        """The number of the batch's task. GraftError where its rows have several."""
        task = tasks_of(self.runtime, self.names_of_tasks, self.key)
        if isinstance(task, Tensor):
            do = "give one task with gw.context(model, task=...), or call the module, which takes each row's own"
            raise GraftError(f"the adapted weight at {self.key}", "each row has another task", do)
        return task

    def weight(self, w: Tensor) -> Tensor:
        # whoever reads the weight around the module sees one draw for the whole batch
        down, up = self.mixed(self.one_task(), 1 if self.drawing else None)
        return w + self.scale * (up @ down).view(w.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = self.mixed(self.one_task())
        return down, self.scale * up

    def overrides(self, function: str) -> bool:
        # one task has factors, but not every batch has one task
        return function != "factors" and super().overrides(function)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        tasks, rows = tasks_of(self.runtime, self.names_of_tasks, self.key), x.shape[0]
        if isinstance(tasks, Tensor):
            tasks = each_row(tasks.to(x.device), rows, self.key)
        down, up = self.mixed(tasks, rows if self.drawing else None)
        if down.dim() == 2:
            return low_rank(x, base, host, down, up, self.scale)
        y = base(x)
        thin = torch.bmm(x.flatten(1, -2) if x.dim() > 2 else x[:, None], down.mT)  # [rows, n, r]
        return torch.add(y, torch.bmm(thin, up.mT).view(y.shape).to(y.dtype), alpha=self.scale)

    def auxiliary_loss(self) -> Tensor | None:
        return -self.prior * log_prior(self.allocation.table) if self.prior else None
