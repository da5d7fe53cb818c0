"""The deltas of READ: the map of an attention, and the recurrence over depth with its correction (see `read`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.core.attention import Attention
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.initial import ones, parameter, uniform, zeros
from graftwork.core.site import Site

from .trail import End, Line, Seen

if TYPE_CHECKING:
    from ..read import READ

CELLS = {"gru": 3, "lstm": 4, "rnn": 1, "linear": 0}  # gates of each


class Map(Delta):
    """Leaves the block's attention map A [batch, seq, seq], the mean over its heads, for the recurrence."""

    def __init__(self, trail: str) -> None:
        super().__init__()
        self.trail = trail

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        if k.shape[2] != q.shape[2]:
            found = (
                f"{q.shape[2]} queries for {k.shape[2]} keys: a key-value cache, which has no states of the recurrence"
            )
            raise GraftError("read with a joiner", found, "generate with use_cache=False, or set joiner=False")
        one = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
        with torch.no_grad():  # attention over the unit vectors is the map itself
            self.runtime.state[self.trail, "inside"] = attention(q, k, one, mask).mean(1)
        return attention(q, k, v, mask)


class Correction(End):
    """gain [d], cell_* the cell's, out = W_out and b_out; with a joiner down = D and joint = W_u; first = P."""

    def __init__(self, method: READ, site: Site, trail: str, at_norm: bool) -> None:
        super().__init__(trail)
        m, d, gates, like = method.d, site.d, CELLS[method.cell], site.like
        self.method, self.at_norm, spread = method, at_norm, uniform(-(m**-0.5), m**-0.5)
        self.gain = parameter((d,), ones, like) if method.norm else None
        self.down = parameter((m, d), spread, like) if method.joiner or not gates else None
        self.joint = parameter((m, m), spread, like) if method.joiner else None
        self.first = parameter((m, d), spread, like) if method.start == "embedding" else None
        read = 2 * m if method.joiner else d
        if gates:
            self.cell_in = parameter((gates * m, read), spread, like)
            self.cell_state = parameter((gates * m, m), spread, like)
            self.cell_in_bias = parameter((gates * m,), spread, like)
            self.cell_state_bias = parameter((gates * m,), spread, like)
        self.out = Line(m, d, like, zeros)

    def finish(self, y: Tensor, seen: list[Seen]) -> Tensor:
        """y + the correction, where the stack ends in a block."""
        return y + self.correction(seen)

    def amend(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The same in front of the last norm."""
        return x.detach() + self.correction(self.runtime.state.pop(self.trail))

    def overrides(self, function: str) -> bool:
        if function in ("amend", "around"):
            return self.at_norm == (function == "amend")
        return super().overrides(function)

    def correction(self, seen: list[Seen]) -> Tensor:
        """s_out (W_out agg_i h_i + b_out) [batch, seq, d]."""
        m, x = self.method, seen[0].x
        h = x.new_zeros(*x.shape[:-1], m.d) if self.first is None else F.linear(self.normed(x), self.first)
        memory, total = torch.zeros_like(h), torch.zeros_like(h)
        for one in seen:
            h, memory = self.advance(self.joined(self.normed(one.h) * m.s_in, h, one.inside), h, memory)
            total = total + h
        return m.s_out * self.out(total / len(seen) if m.agg == "mean" else h)

    def normed(self, phi: Tensor) -> Tensor:
        """RMSNorm(phi)."""
        return phi if self.gain is None else F.rms_norm(phi, phi.shape[-1:], self.gain.to(phi.dtype), 1e-6)

    def joined(self, x: Tensor, h: Tensor, inside: Tensor | None) -> Tensor:
        """What the cell reads: x, or, with a joiner, [D x ; A h W_u]."""
        if self.down is None:
            return x
        x = F.linear(x, self.down)
        if self.joint is None or inside is None:
            return x
        u = inside.to(h.dtype) @ F.linear(h, self.joint)
        return x + u if self.method.cell == "linear" else torch.cat([x, u], -1)

    def advance(self, x: Tensor, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(h_i, the LSTM's memory) from x_i, h_{i-1} and the memory before."""
        if self.method.cell == "linear":
            return h + x, memory
        weights = (self.cell_in, self.cell_state, self.cell_in_bias, self.cell_state_bias)
        x, flat, kept = x.flatten(0, -2), h.flatten(0, -2), memory.flatten(0, -2)
        if self.method.cell == "lstm":
            flat, kept = torch.lstm_cell(x, (flat, kept), *weights)
        else:
            flat = (torch.gru_cell if self.method.cell == "gru" else torch.rnn_tanh_cell)(x, flat, *weights)
        return flat.view(h.shape), kept.view(h.shape)
