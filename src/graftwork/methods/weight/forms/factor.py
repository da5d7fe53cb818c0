"""A trained matrix that is whole, of low rank, or, of a convolution's kernel, in Tucker form (LyCORIS's "effective" convolutions)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graftwork.core.initial import kaiming_uniform, parameter, zeros
from graftwork.core.weight import Weight


class Factor(nn.Module):
    """A matrix [*batch, d, n |kernel|]: `whole`; or up [*batch, d, r] and down [*batch, r, n |kernel|]; or, with core [r, r, *kernel],
    down [r, n].
    """

    def __init__(
        self, w: Weight, d: int, n: int, r: int | None, kernel: tuple[int, ...], core: bool, zero: str
    ) -> None:
        super().__init__()
        k, random = math.prod(kernel), kaiming_uniform()
        self.whole = self.up = self.down = self.core = None
        if r is None:
            self.whole = w.parameter(d, n * k, zeros if zero else random)
            return
        # beside a core it is drawn as [r, d], as LyCORIS stores it
        self.up = w.parameter(d, r, zeros if zero == "up" else kaiming_uniform(fan_in=d if core else r))
        self.down = w.parameter(r, n if core else n * k, zeros if zero == "down" else random)
        if core:
            self.core = parameter((r, r, *kernel), kaiming_uniform(fan_in=r * k), w.like)

    def matrix(self) -> Tensor:
        """The matrix."""
        if self.up is None or self.down is None:
            return self.whole  # type: ignore[return-value]
        return self.up @ (self.down if self.core is None else spread_over(self.core, self.down))


def spread_over(core: Tensor, down: Tensor) -> Tensor:
    """[r, in * kernel] of core [r, r, *kernel] and down [r, in]: the third factor of a Tucker form of a kernel."""
    return torch.einsum("pqk,qi->pik", core.flatten(2), down).flatten(1).to(down.dtype)
