"""The edit of ReFT: a hidden state changed inside a low-rank subspace (see `loreft`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.initial import kaiming_uniform, orthogonal, parameter, uniform, zeros

from .nonlinear import ACTIVATIONS

if TYPE_CHECKING:
    from ..loreft import LoReFT

# variant -> (W is trained, the state's own coordinates are taken out, R has orthonormal rows)
VARIANTS = {
    "loreft": (True, True, True),
    "noreft": (True, True, False),
    "direft": (True, False, False),
    "direft_orthonormal": (True, False, True),
    "consreft": (False, True, True),
    "lobireft": (False, False, True),
}


class Edit(nn.Module):
    """raw [r, d], from which R is made; weight = W [r, d]; bias = b [r]."""

    weight: nn.Parameter | None

    def __init__(self, method: LoReFT, d: int, like: Tensor) -> None:
        super().__init__()
        learned, self.subtract, self.orthonormal = VARIANTS[method.variant]
        self.given: int | None = None  # the version of `raw` that is R itself
        self.act, bound, same = method.act, d**-0.5, method.init == "identity"
        self.raw = parameter((method.r, d), orthogonal if self.orthonormal else kaiming_uniform(), like)
        start = kaiming_uniform() if not same else self.as_rotation if self.subtract else zeros
        self.weight = parameter((method.r, d), start, like) if learned else None
        self.bias = parameter((method.r,), zeros if same else uniform(-bound, bound), like)

    def as_rotation(self, t: Tensor, generator: torch.Generator | None) -> None:
        """An initial value: R."""
        t.copy_(self.rotation().detach())

    def rotation(self) -> Tensor:
        """R [r, d]: the rows of `raw`, orthonormalised in their order (Gram-Schmidt). An R from a file is used to the
        bit."""
        if not self.orthonormal or self.is_rotation():
            return self.raw
        q, triangle = torch.linalg.qr(self.raw.to(torch.promote_types(self.raw.dtype, torch.float32)).mT)
        return (q * triangle.diagonal().sign()).mT.to(self.raw.dtype)

    def is_rotation(self) -> bool:
        """Whether `raw` came as R from a file, and nothing has moved it or is about to."""
        if self.given is None or (self.raw.requires_grad and torch.is_grad_enabled()):
            return False
        return torch.compiler.is_compiling() or self.raw._version == self.given

    def take(self, rotation: Tensor) -> None:
        """Set R."""
        if self.raw.is_meta:
            self.raw = nn.Parameter(rotation.to(self.raw.dtype), self.raw.requires_grad)
        with torch.no_grad():
            self.raw.copy_(rotation)
        self.given = self.raw._version

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": 0 if self.is_rotation() else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.given = None if self.given is None else self.raw._version

    def forward(self, h: Tensor) -> Tensor:
        """The term that is added to h [.., d]."""
        rotation = self.rotation()
        wanted = self.bias if self.weight is None else F.linear(h, self.weight, self.bias)
        wanted = ACTIVATIONS[self.act](wanted)
        if self.subtract:
            wanted = wanted - F.linear(h, rotation)
        return (wanted @ rotation).expand_as(h)
