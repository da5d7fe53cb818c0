"""The delta of a pruned adapter: the delta inside, run with its matrices times their masks (see `sparse`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graftwork.core.adapter import quoted
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError

from .bits import packed, unpacked
from .substituted import Substituted


class Masked(Substituted):
    """Mixin of the two kinds. delta: the one inside; masks: one bool tensor per matrix of it. Pruned entries are zero
    and stay so."""

    delta: Delta
    masks: nn.Module
    pruned: int

    def setup(self, delta: Delta, decided: bool) -> None:
        """decided: no calibration will follow."""
        self.delta, self.masks = delta, nn.Module()
        self.like(delta)
        self.lasting = isinstance(delta, WeightDelta) and delta.lasting
        self.decided, self.scoring, self.absolute, self.rounds = decided, False, False, 0
        self.scores: dict[str, Tensor] = {}
        self.gone: dict[str, int] = {}
        for name, p in delta.named_parameters():
            if p.dim() > 1:
                self.masks.register_buffer(quoted(name), torch.ones(p.shape, dtype=torch.bool, device=p.device))
        if not self.matrices():
            raise GraftError(
                f"prune {type(delta).__name__}", "it has no matrices", "prune a method that trains matrices"
            )

    def mask(self, name: str) -> Tensor:
        """M of a matrix."""
        return self.masks.get_buffer(quoted(name))

    def take(self, name: str, mask: Tensor) -> None:
        """Set the mask of a matrix, given on the CPU."""
        self.mask(name).copy_(mask)
        self.gone[name] = mask.numel() - int(mask.sum())
        self.pruned = sum(self.gone.values())

    def tensors(self) -> dict[str, Tensor]:
        if not self.decided and not self.scoring and self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            raise GraftError("train a sparse adapter", "its masks are not decided yet", "call gw.calibrate first")
        matrices = self.matrices()
        if self.absolute:
            return {name: w.abs() * self.mask(name) for name, w in matrices.items()}
        return {name: w * self.mask(name) for name, w in matrices.items()}

    def start(self, absolute: bool) -> None:
        """A pass that collects scores begins."""
        self.scoring, self.absolute, self.scores = True, absolute, {}

    def collect(self, scores: Mapping[str, Tensor]) -> None:
        """Add a batch's scores."""
        for name, z in scores.items():
            self.scores[name] = self.scores[name] + z.detach() if name in self.scores else z.detach()

    @torch.no_grad()
    def settle(self, last: bool) -> None:
        """The masks of a round are set: what they prune becomes zero."""
        self.scoring, self.absolute, self.scores = False, False, {}
        self.rounds, self.decided = self.rounds + 1, last
        for name, w in self.matrices().items():
            w.data = w.masked_fill(~self.mask(name), 0.0)  # not in place: see `drawing_from`

    def folded(self) -> dict[str, Tensor]:
        """The stored form: for each matrix "bits.name" (uint8, first entry in the highest bit) and "kept.name"; the
        others as they are."""
        out = {}
        for name, value in self.delta.state_dict().items():
            if name in self.matrices():
                mask = self.mask(name)
                out[f"bits.{name}"], out[f"kept.{name}"] = packed(mask), value[mask]
            else:
                out[f"delta.{name}"] = value
        return out

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the stored form, or the unfolded one."""
        dense = {k.removeprefix("delta."): v for k, v in tensors.items() if k.startswith("delta.")}
        for name, w in self.matrices().items():
            key = quoted(name)
            mask = tensors.get(f"masks.{key}")
            if f"bits.{name}" in tensors:
                mask = unpacked(tensors[f"bits.{name}"], w.shape)
                kept = tensors.get(f"kept.{name}", torch.empty(0))
                if mask is None or int(mask.sum()) != kept.numel():
                    found = f"{kept.numel()} values for the bits of {list(w.shape)}"
                    raise GraftError(
                        f"the tensor {name!r} of {getattr(self, 'key', 'a sparse adapter')}", found, "restore the file"
                    )
                dense[name] = kept.new_zeros(w.shape).masked_scatter(mask, kept)
            if mask is not None and mask.shape == w.shape:
                if w.is_meta:
                    self.masks.register_buffer(key, mask.clone())
                self.take(name, mask)
                self.decided = self.decided or not bool(mask.all()) or f"bits.{name}" in tensors
        if any(w.is_meta for w in self.matrices().values()):
            self.delta.to_empty(device="cpu")
        self.delta.restore(dense)


class MaskedDelta(Masked, Delta):  # type: ignore[misc]
    """A pruned activation delta."""


class MaskedWeight(Masked, WeightDelta):  # type: ignore[misc]
    """A pruned weight delta."""
