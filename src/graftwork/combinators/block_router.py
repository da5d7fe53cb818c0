"""A router at every block, whose weights the experts inside of the block ask for (see `moa`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.initial import kaiming_uniform, parameter, zeros
from graftwork.core.passes import Runtime
from graftwork.core.plan import first_tensor
from graftwork.core.site import Site

if TYPE_CHECKING:
    from .moa import MoA


class BlockRouter(Delta):
    """weight, bias = R, or W_2, b_2;  gate, up = W_1, W_3;  tau, tau_bias = t, t_0.  It says w [.., E] of the input of its block."""

    def __init__(self, method: MoA, site: Site, keys: nn.Module) -> None:
        super().__init__()
        experts, d, like = len(method.of), site.d, site.like
        self.gate = self.gate_bias = self.up = self.up_bias = self.tau = self.tau_bias = None
        inner = d
        if method.router == "swiglu":
            inner = method.mult * experts
            self.gate, self.up = (parameter((inner, d), kaiming_uniform(), like) for _ in range(2))
            self.gate_bias, self.up_bias = (parameter((inner,), zeros, like) for _ in range(2))
        self.weight = parameter((experts, inner), kaiming_uniform(), like)
        self.bias = parameter((experts,), zeros, like)
        if method.sparse and method.threshold == "learned":
            self.tau, self.tau_bias = parameter((1, d), zeros, like), parameter((1,), zeros, like)
        self.sparse, self.highest, self.shifted = method.sparse, method.max_threshold, method.shifted
        self._keys = (keys,)

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.runtime.state[self._keys[0], self.key] = self.shares(first_tensor(args, kwargs))
        return base(*args, **kwargs)

    def shares(self, x: Tensor) -> Tensor:
        """w [.., E] for x [.., d]; 0 where an expert is not kept."""
        h = x
        if self.gate is not None and self.up is not None:
            h = F.silu(F.linear(x, self.gate, self.gate_bias)) * F.linear(x, self.up, self.up_bias)
        w = F.linear(h, self.weight, self.bias).float().sigmoid()
        if self.sparse:
            tau = torch.full_like(w[..., :1], self.highest)
            if self.tau is not None:
                tau = self.highest * F.linear(x, self.tau, self.tau_bias).float().sigmoid()
            w = torch.where(w >= tau, w - tau if self.shifted else w, 0.0)
        return w.to(x.dtype)


class Share:
    """w_e of one expert in one block.  sparse: tokens with w_e = 0 are left out."""

    def __init__(self, keys: nn.Module, block: str, expert: int, sparse: bool) -> None:
        self.keys, self.block, self.expert, self.sparse = keys, block, expert, sparse

    def of(self, runtime: Runtime) -> Tensor:
        """w_e [batch, seq, 1] in this pass."""
        w = runtime.state.get((self.keys, self.block))
        if w is None:
            found = "the block was not called before this site in this pass"
            raise GraftError(f"the router of {self.block}", found, "call the model as a whole")
        return w[..., self.expert, None]  # type: ignore[no-any-return]

    def added(self, runtime: Runtime, x: Tensor, y: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """y + w_e change(x, y), for the kept tokens alone where some are left out."""
        w = self.of(runtime).to(y.dtype)
        if w.shape[:-1] != y.shape[:-1]:
            found = f"weights of {list(w.shape[:-1])} tokens for an output {list(y.shape)}"
            raise GraftError(f"an expert of {self.block}", found, "choose sites that see the block's tokens one by one")
        if not self.sparse or torch.compiler.is_compiling():  # how many are kept is not known to a compiler
            return y + w * change(x, y)
        flat = w.flatten()
        at = flat.nonzero()[:, 0]
        if not len(at):
            return y
        some = flat[at, None] * change(x.flatten(0, -2)[at], y.flatten(0, -2)[at])
        return y.flatten(0, -2).index_add(0, at, some.to(y.dtype)).view(y.shape)
