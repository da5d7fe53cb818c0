"""The hypernetwork of generated adapters, and the deltas that run on what it writes (see `generated`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import quoted
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.initial import normal, ones, parameter, zeros
from graftwork.core.tasks import number_of

from .substituted import Substituted

if TYPE_CHECKING:
    from .generated import Generated


class Tasks(nn.Module):
    """z: one embedding [task_dim] per task, each a parameter of its own, so that a batch moves its own task's only."""

    def __init__(self, method: Generated, like: Tensor) -> None:
        super().__init__()
        self.z = nn.ParameterList(parameter((method.task_dim,), normal(), like) for _ in method.tasks)


class Affine(nn.Module):
    """weight [out, in] x + bias [out]."""

    def __init__(self, d_in: int, d_out: int, std: float, like: Tensor) -> None:
        super().__init__()
        self.weight = parameter((d_out, d_in), normal(std), like)
        self.bias = parameter((d_out,), zeros, like)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Controller(nn.Module):
    """One tower's hypernetwork: e [layers, t], p [positions, t], W_a, W_b, the norm of I, and the generators by kind
    and tensor."""

    def __init__(self, method: Generated, layers: int, positions: int, like: Tensor) -> None:
        super().__init__()
        t, std = method.task_dim, method.init_std
        self.layers = parameter((layers, t), normal(), like)
        self.positions = parameter((positions, t), normal(), like) if method.positions else None
        self.first = Affine((3 if method.positions else 2) * t, method.hidden, std, like)
        self.second = Affine(method.hidden, method.proj, std, like)
        self.norm_weight = parameter((method.proj,), ones, like)
        self.norm_bias = parameter((method.proj,), zeros, like)
        self.generators = nn.ModuleDict()
        self.std, self.proj = std, method.proj

    def add(self, kind: str, template: Delta, like: Tensor) -> str:
        """The key of the generators for such a delta; made where there are none yet."""
        shapes = {name: tuple(p.shape) for name, p in template.named_parameters()}
        key = " ".join([kind, *("x".join(map(str, shape)) for shape in shapes.values())]).strip()
        if key not in self.generators:
            made = {quoted(n): Affine(self.proj, math.prod(s), self.std, like) for n, s in shapes.items()}
            self.generators[key] = nn.ModuleDict(made)
        return key

    def forward(self, z: Tensor, kind: str, layer: int, position: int) -> dict[str, Tensor]:
        """name -> flat generated tensor."""
        given = [z, self.layers[layer]] + ([] if self.positions is None else [self.positions[position]])
        i = self.second(F.relu(self.first(torch.cat(given))))
        i = F.layer_norm(i, i.shape, self.norm_weight, self.norm_bias, eps=1e-6)
        return {name: generator(i) for name, generator in self.generators[kind].items()}  # type: ignore[operator]


class Written(Substituted):
    """Mixin of the two kinds: the delta inside holds shapes only (on the meta device); its tensors are generated in
    each pass."""

    def setup(
        self,
        names: tuple[str, ...],
        template: Delta,
        tasks: Tasks,
        tower: Controller,
        kind: str,
        place: tuple[int, int],
    ) -> None:
        """names: of the tasks;  place: (layer, position)."""
        # in a tuple: the template is no child, and the shared modules are registered once, at the model's root
        self._parts = (template.to("meta").requires_grad_(False), tasks, tower)
        self._names, self._kind, self._place = names, kind, place
        self.like(template)

    @property
    def inside(self) -> Delta:
        return self._parts[0]

    def train(self, mode: bool = True) -> Written:
        self._parts[0].train(mode)
        return super().train(mode)  # type: ignore[misc]

    def task(self, name: str | None) -> int:
        """The number of a task. GraftError for an unknown one."""
        return number_of(name, self._names, self.key)  # type: ignore[attr-defined]

    def tensors(self) -> dict[str, Tensor]:
        return self.generate(self.context("task"))  # type: ignore[attr-defined]

    def generate(self, task: str | None) -> dict[str, Tensor]:
        """The delta's tensors for a task."""
        template, tasks, tower = self._parts
        flat = tower(tasks.z[self.task(task)], self._kind, *self._place)
        return {name: flat[quoted(name)].view(p.shape) for name, p in template.named_parameters()}


class GeneratedDelta(Written, Delta):  # type: ignore[misc]
    """A generated activation delta."""


class GeneratedWeight(Written, WeightDelta):  # type: ignore[misc]
    """A generated weight delta."""
