"""The delta of LoHa and ABBA: the elementwise product of two low-rank matrices.

    dW = s (B1 A1) * (B2 A2) = s B A,   B[i, (a, b)] = B1[i, a] B2[i, b],   A[(a, b), j] = A1[a, j] A2[b, j]

The right side is a low-rank product of rank r1 r2 (Singhal et al. 2025, "ABBA", theorem 1: B is a row-wise, A a column-wise
Khatri-Rao product), and is what runs where it is thin. Otherwise dW is formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.delta import WeightDelta

from .dropouts import Dropouts
from .factor import spread_over
from .formed import is_thin

Pair = tuple[nn.Parameter, nn.Parameter]


class HadamardProduct(torch.autograd.Function):
    """(up1 down1) * (up2 down2) [*batch, out, in], of which only the factors are kept for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> Tensor:
        return (up1 @ down1) * (up2 @ down2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        up1, down1, up2, down2 = ctx.saved_tensors
        one, two = grad * (up2 @ down2), grad * (up1 @ down1)
        return one @ down1.mT, up1.mT @ one, two @ down2.mT, up2.mT @ two


class Hadamard(WeightDelta):
    """up1, up2 = B1, B2 [*batch, out, r_i] and down1, down2 = A1, A2 [*batch, r_i, in].

    cores: t1, t2 [r_i, r_i, *kernel] of a convolution, whose down_i is then [r_i, in / groups]: A_i = sum_q t_i[:, q] down_i[q].
    dropout: on the input of A, in training only;  dropouts: of whole rows of dW.
    """

    lasting = True

    def __init__(
        self,
        one: Pair,
        two: Pair,
        scale: float,
        dropout: float = 0.0,
        dropouts: Dropouts | None = None,
        cores: Pair | None = None,
    ) -> None:
        super().__init__()
        (self.up1, self.down1), (self.up2, self.down2) = one, two
        self.core1: nn.Parameter | None
        self.core2: nn.Parameter | None
        self.core1, self.core2 = cores if cores is not None else (None, None)
        self.scale, self.dropout, self.dropouts = scale, dropout, dropouts

    @property
    def thin(self) -> bool:
        """Whether the factors [out, r1 r2] and [r1 r2, in] run, not dW."""
        return is_thin(self._work(), self.view.shape)

    def _work(self) -> int:
        return self.up1.shape[-1] * self.up2.shape[-1] * sum(self.view.shape[-2:])

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if not (self.thin or (self.dropout and self.training)):  # the input of dW as a whole has no mask
            return None
        down1, down2 = self._downs()
        up = (self.up1[..., :, None] * self.up2[..., None, :]).flatten(-2)
        down = (down1[..., :, None, :] * down2[..., None, :, :]).flatten(-3, -2)
        return down, self._kept(self.scale * up)

    def update(self) -> Tensor:
        down1, down2 = self._downs()
        return self._kept(self.scale * HadamardProduct.apply(self.up1, down1, self.up2, down2))

    def overrides(self, function: str) -> bool:
        return self.thin if function == "factors" else super().overrides(function)

    def work(self) -> int:
        return self._work() if self.thin else super().work()

    def _downs(self) -> tuple[Tensor, Tensor]:
        if self.core1 is None or self.core2 is None:
            return self.down1, self.down2
        return spread_over(self.core1, self.down1), spread_over(self.core2, self.down2)

    def _kept(self, rows: Tensor) -> Tensor:
        return rows if self.dropouts is None else self.dropouts.of_rows(rows, self)
