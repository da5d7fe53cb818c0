"""The delta of ReFT: which positions of a row are edited (see `loreft`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.passes import positions
from graftwork.core.site import Site
from graftwork.products.dropout import drop

from .subspace import Edit

if TYPE_CHECKING:
    from ..loreft import LoReFT


class Reft(Delta):
    """edits: the (R, W, b) of the first and of the last positions, or of both."""

    reading = "y"

    def __init__(self, method: LoReFT, site: Site) -> None:
        super().__init__()
        like = site.like
        self.edits: Any = nn.ModuleList(Edit(method, site.d, like) for _ in range(method.sets))
        self.visual = site.tower in ("vision", "video")
        self.span, self.dropout, self.drop_state = method.span, method.dropout, method.drop_state

    @property
    def itself(self) -> bool:  # type: ignore[override]
        """An R from a file is known by the version of its parameter."""
        return any(edit.given is not None for edit in self.edits)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.span is None or y.dim() < 3:
            return y + self.added(y, self.edits[0](y))
        h = y.flatten(1, -2)  # [batch, seq, d]
        if h.shape[1] < self.length() or (self.runtime.past and not self.visual):
            return y  # a decoding step: the prompt is in the key-value cache
        rows = torch.arange(h.shape[0], device=h.device)[:, None]
        places, real = self.places(h)
        old = h[rows, places]
        parts = old.split(self.span, dim=1) if len(self.edits) == 2 else [old]
        terms = [self.added(part, edit(part)) for edit, part in zip(self.edits, parts, strict=True)]
        term = (torch.cat(terms, dim=1) * real[..., None]).to(h.dtype)
        return h.index_put((rows, places), term, accumulate=True).reshape(y.shape)

    def folded(self) -> dict[str, Tensor]:
        """The stored form: R in the place of what it is made from."""
        out = {name: value for name, value in self.state_dict().items() if not name.endswith(".raw")}
        return out | {f"edits.{i}.rotation": edit.rotation().detach() for i, edit in enumerate(self.edits)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the stored form, or the unfolded one."""
        super().restore({name.replace(".rotation", ".raw"): value for name, value in tensors.items()})
        for i, edit in enumerate(self.edits):
            if f"edits.{i}.rotation" in tensors:
                edit.take(tensors[f"edits.{i}.rotation"])

    def length(self) -> int:
        """How many positions the padding mask of the pass speaks of; 0 without one."""
        return 0 if self.mask is None else self.mask.shape[1]

    @property
    def mask(self) -> Tensor | None:
        """The padding mask [batch, seq] of the pass, where it speaks of this tower."""
        mask = None if self.visual else self.runtime.mask
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            found = (
                f"a mask {list(mask.shape)}" if isinstance(mask, Tensor) else f"a mask of type {type(mask).__name__}"
            )
            raise GraftError(f"the prompt's positions at {self.key}", found, "give the padding mask [batch, seq]")
        return mask

    def places(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [batch, p + s] of each row, and which of them are there to edit."""
        assert self.span is not None
        (p, s), (batch, seq) = self.span, h.shape[:2]
        first, count = positions(self.mask, batch, seq, h.device)
        prompt = self.context("prompt_length")
        if prompt is not None:
            count = torch.minimum(count, torch.as_tensor(prompt, device=h.device))
        head = torch.arange(p, device=h.device).expand(batch, p)
        tail = count[:, None] - s + torch.arange(s, device=h.device)
        offsets = torch.cat([head, tail], dim=1)
        # the last tokens of a short prompt are among its first ones
        real = torch.cat([head < count[:, None], tail >= p], dim=1)
        return torch.where(real, first[:, None] + offsets, 0), real

    def added(self, h: Tensor, term: Tensor) -> Tensor:
        """What is added to h, under dropout."""
        if not (self.dropout and self.training):
            return term
        return drop(h + term, self.dropout) - h if self.drop_state else drop(term, self.dropout)
