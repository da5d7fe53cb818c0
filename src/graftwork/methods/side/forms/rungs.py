"""The two deltas of a ladder: beside a block (Rung), and where the side network meets the backbone again (Top)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.initial import ones, parameter, zeros
from graftwork.core.plan import first_output
from graftwork.core.site import Site
from graftwork.products.dropout import drop

from .inputs import CARRIED, Memory, Rotation, room_in
from .thin import initialise, thin_block
from .trail import End, Line, Seen, Step

if TYPE_CHECKING:
    from ..ladder import Ladder


def norm_parts(module: nn.Module) -> list[str]:
    """The parameters of the side network's norm: as those of the backbone's last (scale, or scale and shift)."""
    scale_only = module._parameters.get("weight") is not None and module._parameters.get("bias") is None
    return ["weight"] if scale_only else ["weight", "bias"]


class Rung(Step):
    """One block of the backbone and what stands beside it: first = D_0, down = D_i, side = Side_i, gate = a_i."""

    def __init__(self, method: Ladder, site: Site, trail: str, memory: Memory) -> None:
        super().__init__(site, trail)
        d, thin, like = site.d, site.d // method.r, site.like
        self.method, self._memory = method, (memory,)
        self.first = Line(d, thin, like) if site.layer == 0 else None
        self.side: nn.Module | None = None
        if method.keeps(site.layer or 0):
            self.side = thin_block(site, method.r, method.first(site))
            initialise(self.side, like)
            self.down = Line(d, thin, like)
            self.gate = parameter((1,), zeros, like)
            self.rotation = Rotation(site.module, method.r)

    def climb(self, s: Tensor, h: Tensor, name: str, given: dict[str, Any], carried: dict[str, Any]) -> Tensor:
        """s_i from s_{i-1} [batch, seq, d/r] and h_i [batch, seq, d]."""
        if self.side is None:
            return s
        mu = torch.sigmoid(self.gate / self.method.temperature).to(s.dtype)
        u = mu * s + (1 - mu) * self.down(h) if self.method.mix == "before" else s
        given = given | {key: value for key, value in carried.items() if key in given or key in self.names} | {name: u}
        if given.get("position_embeddings") is not None:
            given["position_embeddings"] = self.rotation(u, given.get("position_ids"))
        if given.get("encoder_hidden_states") is not None:
            given["encoder_hidden_states"] = self._memory[0].of(given["encoder_hidden_states"], self.runtime.state)
        if given.get("past_key_values") is not None:
            room_in(given["past_key_values"], f"{self.trail} {self.key}", self.side)
        out = self.side(**given)
        if isinstance(out, tuple):
            carried |= {key: value for key, value in zip(CARRIED, out[1:], strict=False) if key in self.names}
        s = first_output(out)
        return s if self.method.mix == "before" else mu * s + (1 - mu) * self.down(h)


class Top(End):
    """The end of a stack: norm (weight, bias), up = U, gate = a; no U and gate where another tower reads the states."""

    def __init__(self, method: Ladder, site: Site, trail: str, memory: Memory) -> None:
        super().__init__(trail)
        d, thin, like = site.d, site.d // method.r, site.like
        self.method, self._memory = method, (memory,)
        self.weight = parameter((thin,), ones, like)
        self.bias = parameter((thin,), zeros, like) if len(norm_parts(site.module)) > 1 else None
        self.up = Line(thin, d, like) if site.exit is not None else None
        self.gate = parameter((1,), zeros, like) if site.exit is not None else None

    def finish(self, y: Tensor, seen: list[Seen]) -> Tensor | None:
        """mu U norm(s_L) + (1 - mu) y."""
        s = self.normed(self.climb(seen))
        if self.up is None or self.gate is None:
            self.runtime.state[self._memory[0], "states"] = s
            if not torch.is_grad_enabled():
                self._memory[0].last = (y, s)
            return None
        mu = torch.sigmoid(self.gate / self.method.temperature).to(y.dtype)
        return F.linear(s, mu * self.up.weight, mu * self.up.bias) + (1 - mu) * y

    def climb(self, records: list[Seen]) -> Tensor:
        """s_L [batch, seq, d/r]: the whole side network, from what the blocks left behind."""
        carried: dict[str, Any] = dict.fromkeys(CARRIED)
        s: Any = None
        for seen in records:
            rung = seen.step
            if rung.first is not None:
                s = rung.first(drop(seen.x, self.method.dropout, self.training))
            s = rung.climb(s, seen.h, seen.name, seen.given, carried)
        return s

    def normed(self, s: Tensor) -> Tensor:
        """Like the backbone's last norm: by the mean square alone, or with mean and shift."""
        if self.bias is None:
            return F.rms_norm(s, s.shape[-1:], self.weight, 1e-6)
        return F.layer_norm(s, s.shape[-1:], self.weight, self.bias, 1e-6)
