"""DAS: which whole blocks a small adapter can stand in for is learnt by a bandit, while adapters train in the others.

Wu et al. 2023, "Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained Models", arXiv 2309.01479,
and DoubtedSteam/DAS.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.fields import number, positive, where, words
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from ..activation.bottleneck import Bottleneck
from .forms.search import Search, block_name, candidates
from .forms.skipped import Skipped

PATIENCE = 1000  # training passes without a turn, before a warning


@method("das")
@dataclass(frozen=True)
class DAS(Method):
    """k of the n blocks do not run: S_i(x) = x + W_u relu(W_d LN(x) + b_d) + b_u stands in for block i. The others run, each with
    adapters W_u relu(W_d x + b_d) + b_u beside attention and feed-forward.

    k: how many.  skip_width: of S_i.  adapter_width: of those in the blocks that run.
    Each training pass draws k blocks without replacement, with probabilities in proportion to pi = sigmoid(g), g = 0 at the start.
    Every few steps (10, after a first epoch of warm-up) one turn of the search: gw.calibrate(model, [batch]) on rows held out draws
        `draws` different subsets s_j, takes the rewards R_j = exp(-loss_j), and for each i in s_j
        g_i <- g_i + eta (R_j - mean R) pi_i (1 - pi_i).  per_call: turns in one call; where there is one call alone, before training
        (`graftwork train`), give per_call=turns.
    After `turns` of them the search is over (the paper: from its second to its third epoch): the k largest g are left out from then
        on, as they are in evaluation at all times. Draws and rewards are the same on every process.
    blocks: the blocks that are left out, where they are known ("3", or "decoder.3" in a model of several towers): no search. After the
        search a file holds this form, and only what acts: the blocks named there can be deleted from a deployed model.
    returns: how many values a block returns as a tuple (0: a tensor), where it is known; otherwise the first block that runs shows it.
    A block whose parameters are those of another and more (T5's first: the position bias of all) always runs.
    Not the identity at init: k blocks are left out.  Raises GraftError where k is not below n, or blocks are convolutions.
    Parameters: n - k times (two adapters, 2 d adapter_width + adapter_width + d each), and k times 2 d skip_width + skip_width + 3 d.
    Source: section 3, and the released code.
    When: a model shall become faster by leaving out whole blocks, and which ones is to be found by trying.
    """

    k: int = positive(4)
    skip_width: int = positive(192)
    adapter_width: int = positive(96)
    draws: int = positive(3)
    eta: float = number(1.0, low=0.0)
    turns: int = positive(100)
    per_call: int = positive(1)
    blocks: tuple[str, ...] = words()
    returns: int | None = number(None, low=0)
    at: str = where("block, attn, mlp")

    identity = False

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """A search, where the blocks are not known."""
        return () if self.blocks else ("begin", "calibrate")

    @property
    def instead(self) -> Bottleneck:
        """S_i, as an edit of its input."""
        return Bottleneck(d=self.skip_width, act="relu", norm="before")

    @property
    def inside(self) -> Bottleneck:
        """The adapters of a block that runs."""
        return Bottleneck(d=self.adapter_width, act="relu", position="parallel")

    def build(self, site: Site, part: Part) -> Delta | None:
        search = part.shared("search", lambda: Search(self, candidates(part.sites)))
        name = block_name(site)
        if site.role == "block" and name in search.names:
            made: Delta = Skipped(self.instead.build(site, part), search, site)
        elif site.layer is None or site.role == "block" or name in self.blocks:
            return None
        else:
            made = self.inside.build(site, part)
        if name in search.names:
            search.hold(made, name)
        return made

    def count(self, site: Site) -> int:
        if site.layer is None or (site.role == "block") != (block_name(site) in self.blocks):
            return 0
        return (self.instead if site.role == "block" else self.inside).count(site)

    def count_shared(self, sites: Sequence[Site]) -> int:
        """The blocks that are left out before the search, the last ones, in the place of their adapters."""
        if self.blocks:
            return 0
        gone = Search(self, candidates(sites)).chosen
        there = [s for s in sites if block_name(s) in gone]
        return sum(self.instead.count(s) if s.role == "block" else -self.inside.count(s) for s in there)

    def begin(self, part: Part) -> None:
        search = self._search(part)
        if not self.blocks:
            search.draw()
        if search.passes == PATIENCE and not int(search.turns):
            do = "call gw.calibrate(model, [batch]) every few steps, or give `blocks`"
            warnings.warn(f"{PATIENCE} training passes of {self.name} without a turn of its search: {do}", stacklevel=2)

    def calibrating(self, part: Part) -> None:
        self._search(part).next_trial()

    def observe(self, part: Part, loss: Tensor) -> None:
        self._search(part).losses.append(loss.detach())

    def calibrated(self, part: Part) -> bool:
        return self._search(part).reward()

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """After the search, what acts, with the names of the blocks that are left out."""
        search = self._search(part)
        if self.blocks or not bool(search.settled):
            return super().fold(part)
        chosen = tuple(name for name in search.names if name in search.chosen)
        fixed = dataclasses.replace(self, blocks=chosen, returns=search.returns)
        tensors = {key: dict(d.state_dict()) for key, d in part.deltas.items() if not d.pruned}
        return fixed, tensors, dict(part.shared_modules.state_dict())

    def _search(self, part: Part) -> Search:
        found = part.shared_modules["search"]
        assert isinstance(found, Search)
        return found
