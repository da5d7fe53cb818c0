"""A low-rank update in the form of an SVD, whose triplets are scored by how much the loss would feel their loss.

Zhang et al. 2023, "AdaLoRA", eq. 3 (the form), 4 (orthogonality), 8 to 11 (sensitivity, uncertainty and the score of a
triplet).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from graftwork.core.delta import WeightDelta
from graftwork.core.initial import normal, zeros
from graftwork.core.weight import Weight


class Triplets(WeightDelta):
    """down = A [*batch, r, in], values = e [*batch, r], up = B [*batch, out, r].

    scale: s;  share: weight of this matrix's |A A^T - I| + |B^T B - I| in the loss;  dropout: on the input of A, in
    training only. Once a schedule runs: mean_* and spread_*, the smoothed sensitivity and uncertainty of each; `gone`
    [*batch, r] after the final allocation.
    """

    lasting = True
    gone: Tensor

    def __init__(self, w: Weight, r: int, scale: float, dropout: float, share: float) -> None:
        super().__init__()
        self.down = w.parameter(r, w.d_in, normal(0.02))
        self.values = w.vector(r, zeros)
        self.up = w.parameter(w.d_out, r, normal(0.02))
        self.scale, self.dropout, self.share, self.matrices = scale, dropout, share, w.copies

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.scale * self.up * self.values[..., None, :]

    def auxiliary_loss(self) -> Tensor | None:
        if not self.share:
            return None
        eye = torch.eye(self.down.shape[-2], dtype=self.down.dtype, device=self.down.device)
        off = [self.down @ self.down.mT - eye, self.up.mT @ self.up - eye]
        return self.share * torch.stack([torch.linalg.matrix_norm(m).sum() for m in off]).sum()

    def observed(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter((("down", self.down), ("values", self.values), ("up", self.up)))

    def observe(self, beta1: float, beta2: float) -> None:
        """Take this step's |p * grad| into the averages."""
        for name, p in self.observed():
            now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            for kind in ("mean", "spread"):
                if f"{kind}_{name}" not in self._buffers:
                    self.register_buffer(f"{kind}_{name}", torch.zeros_like(p))
            mean, spread = self.get_buffer(f"mean_{name}"), self.get_buffer(f"spread_{name}")
            mean.lerp_(now, 1 - beta1)
            spread.lerp_((now - mean).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """One number per triplet [*batch, r]."""
        if "mean_up" not in self._buffers:
            return torch.zeros_like(self.values)
        down, values, up = (self.get_buffer(f"mean_{n}") * self.get_buffer(f"spread_{n}") for n, _ in self.observed())
        return values + down.mean(-1) + up.mean(-2)

    def kept(self) -> dict[str, Tensor]:
        """The tensors that the update is made of, without the triplets that are gone for good (experts keep them, as
        zeros)."""
        down, values, up = self.down.detach(), self.values.detach(), self.up.detach()
        gone = self._buffers.get("gone")
        if gone is not None and gone.dim() == 1:
            down, values, up = down[~gone], values[~gone], up[:, ~gone]
        return {"down": down, "values": values, "up": up}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take stored tensors; there may be fewer triplets than at the start, and the state of the schedule with
        them."""
        left = tensors["values"].shape[-1] if "values" in tensors else self.values.shape[-1]
        if left < self.values.shape[-1]:
            self.down = nn.Parameter(self.down.detach()[..., :left, :].clone(), self.down.requires_grad)
            self.values = nn.Parameter(self.values.detach()[..., :left].clone(), self.values.requires_grad)
            self.up = nn.Parameter(self.up.detach()[..., :left].clone(), self.up.requires_grad)
        for name, p in self.observed():
            for kind in ("mean", "spread"):
                if f"{kind}_{name}" in tensors:
                    self.register_buffer(f"{kind}_{name}", torch.zeros_like(p, requires_grad=False))
        if "gone" in tensors:
            self.register_buffer("gone", torch.zeros_like(self.values, dtype=torch.bool, requires_grad=False))
        super().restore(tensors)
