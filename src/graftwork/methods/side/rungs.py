"""The two deltas of a ladder: beside a block (Rung), and where the side network meets the backbone again (Top)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.delta import Delta
from graftwork.core.initial import kaiming_uniform, ones, parameter, zeros
from graftwork.core.plan import first_output, first_tensor, replace_output
from graftwork.core.site import Site

from .inputs import CARRIED, Memory, Rotation, room_in
from .thin import initialise, thin_block

if TYPE_CHECKING:
    from .ladder import Ladder


def norm_parts(module: nn.Module) -> list[str]:
    """The parameters of the side network's norm: as those of the backbone's last (scale, or scale and shift)."""
    scale_only = module._parameters.get("weight") is not None and module._parameters.get("bias") is None
    return ["weight"] if scale_only else ["weight", "bias"]


class Line(nn.Module):
    """x W^T + b,  W [out, in]."""

    def __init__(self, d_in: int, d_out: int, like: Tensor) -> None:
        super().__init__()
        self.weight = parameter((d_out, d_in), kaiming_uniform(), like)
        self.bias = parameter((d_out,), zeros, like)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Rung(Delta):
    """One block of the backbone and what stands beside it: first = D_0, down = D_i, side = Side_i, gate = a_i."""

    def __init__(self, method: Ladder, site: Site, trail: str, memory: Memory) -> None:
        super().__init__()
        d, thin, like = site.d, site.d // method.r, site.like
        self.method, self.trail, self._memory = method, trail, (memory,)
        self.names = list(inspect.signature(site.module.forward).parameters)
        self.first = Line(d, thin, like) if site.layer == 0 else None
        self.side: nn.Module | None = None
        if method.keeps(site.layer or 0):
            self.side = thin_block(site, method.r, method.first(site))
            initialise(self.side, like)
            self.down = Line(d, thin, like)
            self.gate = parameter((1,), zeros, like)
            self.rotation = Rotation(site.module, method.r)

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = base(*args, **kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        x = first_tensor(args, kwargs)
        name = next(key for key, value in given.items() if value is x)
        self.runtime.state.setdefault(self.trail, []).append(
            (self, name, x.detach(), first_output(out).detach(), given)
        )
        return out

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


class Top(Delta):
    """The end of a stack: norm (weight, bias), up = U, gate = a; no U and gate where another tower reads the states."""

    def __init__(self, method: Ladder, site: Site, trail: str, memory: Memory) -> None:
        super().__init__()
        d, thin, like = site.d, site.d // method.r, site.like
        self.method, self.trail, self._memory = method, trail, (memory,)
        self.weight = parameter((thin,), ones, like)
        self.bias = parameter((thin,), zeros, like) if len(norm_parts(site.module)) > 1 else None
        self.up = Line(thin, d, like) if site.exit is not None else None
        self.gate = parameter((1,), zeros, like) if site.exit is not None else None

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x: Any = first_tensor(args, kwargs)
        records = self.runtime.state.setdefault(self.trail, [])
        if not records and hasattr(x, "graft_records"):
            records.extend(x.graft_records)  # gradient checkpointing runs the last block again, outside of the pass
        before = tuple(records)
        with torch.no_grad():
            out = base(*args, **kwargs)
        if len(records) > len(before) and not torch.compiler.is_compiling():
            x.graft_records = before
        y, s = first_output(out).detach(), self.normed(self.climb(self.runtime.state.pop(self.trail)))
        if self.up is None or self.gate is None:
            self.runtime.state[self._memory[0], "states"] = s
            if not torch.is_grad_enabled():
                self._memory[0].last = (y, s)
            return out
        mu = torch.sigmoid(self.gate / self.method.temperature).to(y.dtype)
        z = F.linear(s, mu * self.up.weight, mu * self.up.bias) + (1 - mu) * y
        return z if isinstance(out, Tensor) else replace_output(out, z)

    def climb(self, records: list[Any]) -> Tensor:
        """s_L [batch, seq, d/r]: the whole side network, from what the blocks left behind."""
        carried: dict[str, Any] = dict.fromkeys(CARRIED)
        s: Any = None
        for rung, name, x, h, given in records:
            if rung.first is not None:
                s = rung.first(F.dropout(x, self.method.dropout, self.training))
            s = rung.climb(s, h, name, given, carried)
        return s

    def normed(self, s: Tensor) -> Tensor:
        """Like the backbone's last norm: by the mean square alone, or with mean and shift."""
        if self.bias is None:
            return F.rms_norm(s, s.shape[-1:], self.weight, 1e-6)
        return F.layer_norm(s, s.shape[-1:], self.weight, self.bias, 1e-6)
