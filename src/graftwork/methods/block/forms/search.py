"""The bandit that learns which blocks can be left out (see `das`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.grafted import backbone_modules
from graftwork.core.plan import channels_first
from graftwork.core.site import Site

if TYPE_CHECKING:
    from ..das import DAS


def block_name(site: Site) -> str:
    """The block that a site stands in: "3", or "decoder.3" where there are towers."""
    return f"{site.tower}.{site.layer}" if site.tower else str(site.layer)


def candidates(sites: Sequence[Site]) -> list[str]:
    """The blocks that may be left out. GraftError for a convolution, whose output has another shape than its input."""
    blocks = [s for s in sites if s.role == "block" and s.layer is not None]
    held = {id(s): {(path, name) for path, m in backbone_modules(s.module) for name in m._parameters} for s in blocks}
    for s in blocks:
        if channels_first(s.module):
            raise GraftError(f"leave out {s.path}", "a block of convolutions", "choose a transformer")
    return [
        block_name(s)
        for s in blocks
        if not any(held[id(s)] > held[id(other)] for other in blocks if other.tower == s.tower)
    ]


class Search(nn.Module):
    """turns: how many updates the gates had;  settled: the search is over.

    chosen: the names of the blocks with the k largest gates, of equal ones the last; they are left out in evaluation.
    returns: how many values a block returns as a tuple, 0 for a tensor, None where that is not known yet.
    """

    turns: Tensor
    settled: Tensor

    def __init__(self, method: DAS, names: Sequence[str]) -> None:
        super().__init__()
        self.method, self.names, self.k = method, list(method.blocks or names), len(method.blocks) or method.k
        unknown = [name for name in method.blocks if name not in names]
        if unknown or self.k >= len(names) + bool(method.blocks):
            asked = f"leave out the block {unknown[0]!r}" if unknown else f"leave out {self.k} blocks"
            raise GraftError(asked, f"{len(names)} that may be: {', '.join(names)}", "choose fewer, or among them")
        for name in ("turns", "settled"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device="cpu"))
        self.returns = method.returns
        self._blocks: dict[str, Any] = {}  # those that stand in for a block, and have its gate
        self._deltas: list[tuple[Delta, str, int]] = []
        self._drawn: frozenset[str] | None = None  # left out in training passes, or in the trials of a turn in any
        self._trials: list[list[int]] = []
        self._rewards: list[float] = []
        self.losses: list[Tensor] = []
        self.passes = 0  # drawn for
        self.refresh()

    def hold(self, delta: Delta, name: str) -> None:
        """A delta that stands in for the block, or one in it: only one of the two kinds acts."""
        self._deltas.append((delta, name, sum(p.numel() for p in delta.parameters())))
        if hasattr(delta, "instead"):
            self._blocks[name] = delta
        self.refresh()

    @property
    def gates(self) -> Tensor:
        """g [n], on the CPU; 0 of a block that is not built yet."""
        return torch.tensor(
            [float(self._blocks[n].gate) if n in self._blocks else 0.0 for n in self.names], device="cpu"
        )

    def refresh(self) -> None:
        """Choose by the gates as they are now."""
        values = self.gates.tolist()
        order = sorted(range(len(values)), key=lambda i: (values[i], i))
        self.chosen = frozenset(self.names[i] for i in order[-self.k :])
        for delta, name, size in self._deltas:
            acts = (name in self.chosen) == (delta is self._blocks.get(name))
            delta.pruned = 0 if acts else size

    def skips(self, name: str, training: bool) -> bool:
        """Whether the block is left out in this pass."""
        drawn = self._drawn if training or self._trials else None
        return name in (self.chosen if drawn is None else drawn)

    def draw(self) -> None:
        """A training pass begins."""
        if not self._trials and not bool(self.settled):
            self._drawn, self.passes = self._named(self._subset()), self.passes + 1

    def next_trial(self) -> None:
        """The next subset of a turn, or the first of a new one."""
        if bool(self.settled):
            raise GraftError("gw.calibrate", "the search for blocks to leave out is over", "leave the call out")
        if not self._rewards:
            self._trials = []
            while len(self._trials) < min(self.method.draws, math.comb(len(self.names), self.k)):
                subset = self._subset()
                self._trials += [] if subset in self._trials else [subset]
        self._drawn, self.losses = self._named(self._trials[len(self._rewards)]), []

    def reward(self) -> bool:
        """A trial's losses are known; the gates move after the last. Whether the call of `gw.calibrate` goes on."""
        loss = torch.stack(self.losses).mean().float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        self._rewards.append(math.exp(-float(loss)))
        if len(self._rewards) < len(self._trials):
            return True
        self.update(self._trials, self._rewards)
        self._trials, self._rewards, self._drawn = [], [], None
        self.settled.fill_(int(self.turns) >= self.method.turns)
        return not bool(self.settled) and int(self.turns) % self.method.per_call > 0

    @torch.no_grad()
    def update(self, trials: Sequence[Sequence[int]], rewards: Sequence[float]) -> None:
        """g_i += eta (R_j - mean R) pi_i (1 - pi_i) for each i in s_j, pi of the gates before."""
        pi, mean = self.gates.sigmoid(), sum(rewards) / len(rewards)
        for subset, r in zip(trials, rewards, strict=True):
            for i in subset:
                self._blocks[self.names[i]].gate += self.method.eta * (r - mean) * float(pi[i] * (1 - pi[i]))
        self.turns += 1
        self.refresh()

    def _subset(self) -> list[int]:
        """k blocks drawn without replacement, the same on every process."""
        drawn = torch.multinomial(self.gates.sigmoid(), self.k)
        if dist.is_available() and dist.is_initialized():
            shared = [drawn]
            dist.broadcast_object_list(shared)
            drawn = shared[0]
        return sorted(drawn.tolist())

    def _named(self, subset: Sequence[int]) -> frozenset[str]:
        return frozenset(self.names[i] for i in subset)
