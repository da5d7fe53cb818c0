"""The deltas of a method that is split (see `split_merge`): the delta inside, with a random copy of its matrices, or their mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.initial import tensor, uniform
from graftwork.core.kept import Keeper

from .substituted import Substituted


def layers_of(delta: Delta, share: str) -> dict[str, str]:
    """The matrices that are split, each with the name of its bias, or "" where it has none."""
    own = {name: p for name, p in delta._parameters.items() if p is not None}
    split = ("up",) if share == "down" else ("up", "down")
    biases = {name: f"{name}_bias" if f"{name}_bias" in own else "" for name in own}
    return {name: biases[name] for name, p in own.items() if p.dim() > 1 and delta.role(name) in split}


class Split(Substituted):
    """Mixin of the two kinds. delta: the one inside, without its split tensors;  start: W_0;  owner: which i has each entry;
    values: of each matrix the entries under M_1, M_2 ..., in order; of each bias its copies.
    """

    delta: Delta
    training: bool

    def setup(self, delta: Delta, layers: Mapping[str, str], copies: int, joint: bool) -> None:
        self.delta, self.layers, self.copies, self.joint = delta, dict(layers), copies, joint
        self.like(delta)
        self.lasting = isinstance(delta, WeightDelta) and delta.lasting
        split = [name for pair in layers.items() for name in pair if name]
        self.roles = {name: delta.role(name) for name in split}
        self.start, self.owner, self.values = nn.Module(), nn.Module(), nn.ModuleDict()
        for name, bias in layers.items():
            w = delta.get_parameter(name).detach()
            owner = _owners(w, copies)
            self.start.register_buffer(name, w)
            self.owner.register_buffer(name, owner)
            self.values[name] = nn.ParameterList([nn.Parameter(_entries(w, owner, i, copies)) for i in range(copies)])
            if bias:
                b = delta.get_parameter(bias).detach()
                self.values[bias] = nn.ParameterList([nn.Parameter(b.clone()) for _ in range(copies)])
        for name in split:
            delta._parameters[name] = None
        self._kept: Keeper[dict[str, Tensor]] = Keeper([self.start, self.owner, *self.values.values()])

    def copy(self, name: str, i: int) -> dict[str, Tensor]:
        """W_i of a matrix, and its bias."""
        w, bias = self.start.get_buffer(name), self.layers[name]
        made = {name: w.masked_scatter(self.owner.get_buffer(name) == i, self._values(name, i))}
        return made | {bias: self._values(bias, i)} if bias else made

    def drawn(self, name: str) -> dict[str, Tensor]:
        """A random copy."""
        if self.copies == 1:
            return self.copy(name, 0)
        if not torch.compiler.is_compiling():
            return self.copy(name, int(torch.randint(self.copies, ())))
        every, i = [self.copy(name, i) for i in range(self.copies)], torch.randint(self.copies, (1,))
        return {
            n: torch.stack([made[n] for made in every]).index_select(0, i.to(t.device))[0] for n, t in every[0].items()
        }

    def merged(self) -> dict[str, Tensor]:
        """What is stored."""
        out = {}
        for name, bias in self.layers.items():
            w = whole = self.start.get_buffer(name)
            for i in range(self.copies):
                whole = whole.masked_scatter(self.owner.get_buffer(name) == i, self._values(name, i))
            out[name] = whole if self.joint or self.copies == 1 else w + (whole - w) / self.copies
            if bias:
                out[bias] = torch.stack([self._values(bias, i) for i in range(self.copies)]).mean(0)
        return out

    def tensors(self) -> dict[str, Tensor]:
        if self.training and torch.is_grad_enabled():
            return {n: t for name in self.layers for n, t in self.drawn(name).items()}
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.merged()
        return self._kept.get("merged", self.merged)

    def role(self, tensor: str) -> str:
        home, _, name = tensor.partition(".")
        return self.roles[name.partition(".")[0]] if home == "values" else self.delta.role(name)

    def _values(self, name: str, i: int) -> Tensor:
        return self.values[name][i]  # type: ignore[index,no-any-return]


def _owners(w: Tensor, copies: int) -> Tensor:
    """The number of the copy that has each entry: the entries in a random order, cut into as many pieces."""
    if copies == 1:
        return torch.zeros(w.shape, dtype=torch.int16, device=w.device)
    order = tensor((w.numel(),), uniform(0.0, 1.0), w.new_empty(0, dtype=torch.float32)).argsort()
    owner = torch.empty(w.numel(), dtype=torch.int16, device=w.device)
    owner[order] = (torch.arange(w.numel(), device=w.device) * copies // w.numel()).to(torch.int16)
    return owner.view(w.shape)


def _entries(w: Tensor, owner: Tensor, i: int, copies: int) -> Tensor:
    """Those of W under M_i. Without values there are as many."""
    if not w.is_meta:
        return w[owner == i]
    n = w.numel()
    return w.new_empty(-(-(i + 1) * n // copies) + (-i * n // copies))


class SplitDelta(Split, Delta):  # type: ignore[misc]
    """Of an activation delta."""


class SplitWeight(Split, WeightDelta):  # type: ignore[misc]
    """Of a weight delta."""
