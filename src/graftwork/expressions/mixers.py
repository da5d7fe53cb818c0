"""The mixers that expressions themselves bring: fixed weights, and ranges of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import GraftError
from ..core.mixer import Members, Mixer


class Fixed(Mixer):
    """w_i = c_i everywhere."""

    def __init__(self, factors: Sequence[float]) -> None:
        super().__init__()
        self.factors = list(factors)

    def weights(self, x: Tensor, y: Tensor, members: Members) -> Tensor:
        return torch.tensor(self.factors, dtype=y.dtype, device=y.device)


class Ranges(Mixer):
    """The i-th member has the tokens from bounds[i] up to bounds[i + 1] of each row, None being the end; y elsewhere."""

    def __init__(self, lengths: Sequence[int], tower: str = "") -> None:
        super().__init__()
        self.masked = tower in ("", "encoder", "text")  # the pass's mask speaks of this tower's tokens
        self.cached = tower in ("", "decoder", "text")
        self.spans: list[tuple[int, int | None]] = []
        begin = 0
        for n in lengths:
            self.spans.append((begin, None if n == -1 else begin + n))
            begin += max(n, 0)

    def weights(self, x: Tensor, y: Tensor, members: Members) -> Tensor:
        return torch.stack(self._chosen(y, members), -1).to(y.dtype)

    def mix(self, x: Tensor, y: Tensor, values: Sequence[Tensor], members: Members) -> Tensor:
        total = y
        for chosen, z in zip(self._chosen(y, members), values, strict=True):
            total = torch.where(chosen[..., None], z, total)
        return total

    def _chosen(self, y: Tensor, members: Members) -> list[Tensor]:
        at = self._positions(y)
        spans = [self.spans[n] for n in members.who]
        return [(at >= a) if b is None else (at >= a) & (at < b) for a, b in spans]

    def _positions(self, y: Tensor) -> Tensor:
        """The place of each token among those of its row, [batch or 1, seq]."""
        if y.dim() != 3:
            do = "choose another `at` for these adapters, or leave the site's layer out with drop(...)"
            raise GraftError(f"split at {self.key}", f"no tokens in {list(y.shape)}: not [batch, seq, d]", do)
        seq, mask = y.shape[1], self.runtime.mask if self.masked else None
        at = torch.arange(seq, device=y.device)[None]
        if mask is None or mask.dim() != 2:
            return at + self.runtime.past if self.cached else at
        if mask.shape[0] != y.shape[0] or mask.shape[1] < seq:
            found = f"{list(y.shape)} for an attention_mask {list(mask.shape)}"
            raise GraftError(f"split at {self.key}", found, "split adapters where every token of the input stands")
        return at + (mask.shape[1] - seq) - mask.long().argmax(1)[:, None]  # what is cached stands in front
