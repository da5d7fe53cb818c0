"""State of one forward pass, shared by all sites of one model.

The outermost grafted call opens the pass and closes it. Inside a pass a grafted parameter answers with its adapted value; outside it
answers with the plain one, because infrastructure (FSDP, state dicts, optimisers) reads parameters by name. A block that gradient
checkpointing runs again during the backward pass counts as inside: it must see what the first run saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import GraftError

if TYPE_CHECKING:
    from ..batched.rows import Table
    from ..expressions.branches import Branches


class Runtime:
    """What the sites of one model share: the pass, its inputs and the context.

    running: the outermost grafted call is open;  state: what deltas hand to each other within a pass (cleared by the root's call);
    context: side information per batch or row, set by `gw.context`;  mask: the padding mask [batch, seq] of the pass, or None.
    past: how many tokens of each row the key-value cache held when the pass began (transformers' `generate` leaves out a mask of ones).
    draw: one number in [0, 1) for all sites of a training pass, where a delta asks for one by setting `draws`.
    keeps_weights: inference passes keep adapted weights that are dear to make, set by `gw.keep_weights`.
    rows: which adapter each row has, while `rows(...)` is active;  stacks: tensors of many adapters as one, kept for the next `rows`;
    by_rows: modules, by path, that are known to have the batch along axis 0, and whether several entries there belong to one row.
    branches: what each of several expressions side by side needs, while `a | b` is active.
    parts: what takes, from states [batch, ..., d] of all tokens, those of the tokens that a module now runs for (`run_part`).
    left_out: paths of modules that were not called on purpose: the adapters below them are not missed.
    generating: inside `model.generate`, where a row of the batch may have become several.
    watching: is told, for a site's key, which members are mixed there and by which weights, inside of `gw.mixing_weights`.
    """

    def __init__(self) -> None:
        self.running = False
        self.state: dict[Any, Any] = {}
        self.context: dict[str, Any] = {}
        self.mask: Tensor | None = None
        self.past = 0
        self.draws, self.draw = False, 0.0
        self.keeps_weights = True
        self.rows: Table | None = None
        self.branches: Branches | None = None
        self.stacks: dict[Any, Any] = {}
        self.by_rows: dict[str, bool] = {}
        self.parts: tuple[Callable[[Tensor], Tensor], ...] = ()
        self.left_out: set[str] = set()
        self.generating = 0
        self.watching: Callable[[str, tuple[int, ...], Tensor], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copied or pickled model starts outside any pass
        outside = {
            "running": False,
            "state": {},
            "mask": None,
            "past": 0,
            "draw": 0.0,
            "stacks": {},
            "parts": (),
            "left_out": set(),
            "generating": 0,
            "watching": None,
        }
        kept = {
            name: getattr(self, name) for name in ("context", "draws", "rows", "branches", "keeps_weights", "by_rows")
        }
        return kept | outside

    @contextmanager
    def generation(self) -> Iterator[None]:
        """The model's `generate` runs in this block."""
        self.generating += 1
        try:
            yield
        finally:
            self.generating -= 1

    def run_part(self, take: Callable[[Tensor], Tensor], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """call(*args, **kwargs), a module given some tokens alone; deltas inside that read states of all tokens get take(states)."""
        before, self.parts = self.parts, (*self.parts, take)
        try:
            return call(*args, **kwargs)
        finally:
            self.parts = before

    def part(self, states: Tensor, depth: int) -> Tensor:
        """States that were captured where `depth` of the parts had been taken, for the tokens of now."""
        for take in self.parts[depth:]:
            states = take(states)
        return states

    @property
    def open(self) -> bool:
        """Whether a pass is open, or a backward pass is running a checkpointed block again."""
        if self.running:
            return True
        return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

    def begin(self, mask: Tensor | None, cache: Any = None, training: bool = False) -> None:
        """The model itself was called: a fresh pass. cache: its `past_key_values`."""
        self.state, self.left_out = {}, set()
        self.past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if self.draws and training:
            self.draw = float(torch.rand(()))
        self.mask = mask if mask is not None else self.context.get("padding")

    def end(self) -> None:
        """The model's call is over. Only the mask and the draw stay, for blocks that the backward pass runs again."""
        self.state, self.past = {}, 0


def positions(mask: Tensor | None, batch: int, seq: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First real position and number of real positions of each row, both [batch], from the padding mask [batch, total].

    A mask longer than seq means that the earlier positions are in a key-value cache.
    """
    if mask is None or mask.dim() != 2:
        zero = torch.zeros(batch, dtype=torch.long, device=device)
        return zero, zero + seq
    real = mask.to(torch.long)
    return real.argmax(dim=1), real.sum(dim=1)


def token_mean(values: Tensor, runtime: Runtime, real: bool) -> Tensor:
    """The mean over the tokens of each example, [batch, 1, ..., n] for values [batch, ..., n].

    real: padding is left out, by the pass's mask [batch, seq].  GraftError for a mask that does not fit, and under a key-value cache.
    """
    if runtime.past:
        found = "a key-value cache, whose tokens are not seen again"
        raise GraftError("a gate that is a mean over all tokens", found, "generate with use_cache=False")
    over, mask = tuple(range(1, values.dim() - 1)), runtime.mask
    if not over:
        return values
    if not real or mask is None:
        return values.mean(over, keepdim=True)
    if mask.shape != values.shape[:2]:
        found = f"an attention mask of shape {list(mask.shape)} for tokens {list(values.shape[:-1])}"
        raise GraftError("a mean over tokens that leaves padding out", found, "give a mask [batch, seq]")
    weight = mask.to(values.dtype).view(*mask.shape, *[1] * (values.dim() - 2))
    return (values * weight).sum(over, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
