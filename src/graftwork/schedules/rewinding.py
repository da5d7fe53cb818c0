"""Pruning visual prompts and training what is left from the start: the recipe of E^2VPT.

Han et al. 2023, arXiv 2307.13770, section 3.3 and algorithm 1; ChengHan111/E2VPT, src/engine/trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import GraftError
from ..grafting.graft import find
from ..methods.input.pruned_vpt import Masks, PrunedPrompt


class Rewinding:
    """rewinding = gw.Rewinding(model, name), made before the training, keeps where the adapter `name` starts. After the training

        rewinding.measure(batches)                   # what each token and each piece of one is worth
        for share in (0.1, ..., 0.9):
            rewinding.rewind(share)                  # prune, and put all that is left back to the start
            ...                                      # train again, with an optimiser of its own, and validate: the best share stays

    GraftError for an adapter without pruned_vpt.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.adapter = model, find(model, name)
        self.prompts = [d for d in self.adapter.deltas() if isinstance(d, PrunedPrompt)]
        if not self.prompts:
            raise GraftError(f"rewind {name!r}", "no prompts that can be pruned", "graft 'e2vpt' or 'pruned_vpt'")
        self.start = {key: p.detach().clone() for key, p in self.adapter.named_parameters()}
        self.scores: list[tuple[Tensor, Tensor]] | None = None

    @property
    def masks(self) -> list[Masks]:
        """Those of each pruned_vpt of the adapter."""
        return list(dict.fromkeys(prompt.masks for prompt in self.prompts))

    def measure(
        self,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        signed: bool = True,
    ) -> None:
        """Scores: d loss / d M, the mean over the batches, with M = 1.

        loss(model, batch): model(**batch).loss by default.  signed: as released; otherwise the mean of |d loss / d M|.
        A token's score is the sum of those of its pieces. Where a layer norm reads the prompts before anything else does (every
        pre-norm block), it does not see how long a token is: that sum is zero but for rounding, and which tokens go is chance.
        """
        held = [t for masks in self.masks for t in (masks.tokens, masks.pieces)]
        totals, n = [torch.zeros_like(t) for t in held], 0
        before = [t.clone() for t in held]
        try:
            for t in held:
                t.fill_(1).requires_grad_(True)
            for batch in batches:
                value = self.model(**batch).loss if loss is None else loss(self.model, batch)
                for total, g in zip(totals, torch.autograd.grad(value, held), strict=True):
                    total += g if signed else g.abs()
                n += 1
        finally:
            for t, old in zip(held, before, strict=True):
                t.requires_grad_(False).copy_(old)
        if not n:
            raise GraftError("measure what prompts are worth", "no batch", "give at least one batch")
        means = [total / n for total in totals]
        self.scores = list(zip(means[::2], means[1::2], strict=True))

    @torch.no_grad()
    def rewind(self, tokens: float, pieces: float | None = None, min_tokens: int = 1, min_segments: int = 4) -> None:
        """Prune the shares `tokens` of all tokens and `pieces` (None: the same) of each token's pieces that are worth least, at least
        `min_tokens` and `min_segments` stay; then every number of the adapter that is left goes back to where it started.
        """
        shares = (tokens, tokens if pieces is None else pieces)
        if self.scores is None or not all(0 <= share < 1 for share in shares):
            found = "nothing is measured yet" if self.scores is None else "a share is not in [0, 1)"
            raise GraftError(f"rewind({tokens}, {pieces})", found, "call measure(batches), and give shares such as 0.3")
        for masks, (of_tokens, of_pieces) in zip(self.masks, self.scores, strict=True):
            masks.tokens.copy_(_kept(of_tokens, shares[0], min_tokens))
            masks.pieces.copy_(_kept(of_pieces, shares[1], min_segments))
        for key, p in self.adapter.named_parameters():
            p.copy_(self.start[key])
            p.grad = None
        for prompt in self.prompts:
            prompt.settle()


def _kept(scores: Tensor, share: float, least: int) -> Tensor:
    """1 where a score [..., n] is not among the floor(share n) smallest of its row, `least` of which stay; 0 elsewhere."""
    n = scores.shape[-1]
    gone = min(int(share * n + 1e-9), max(n - least, 0))
    smallest = scores.argsort(dim=-1, stable=True)[..., :gone]
    return torch.ones_like(scores).scatter(-1, smallest, 0.0)
