"""The delta of `vblora`: factors put together from the vectors of a bank that all sites share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.initial import normal, parameter, uniform
from graftwork.core.site import Site

if TYPE_CHECKING:
    from ..vblora import VBLoRA

SIDES = ("down", "up")


class Bank(nn.Module):
    """vectors = V [vectors, length], of all sites."""

    def __init__(self, method: VBLoRA, like: Tensor | None) -> None:
        super().__init__()
        bound = method.init_bound
        self.vectors = parameter((method.vectors, method.length), uniform(-bound, bound), like)


class Composed(WeightDelta):
    """logits_down [*batch, r, in / length, vectors], logits_up [*batch, out / length, r, vectors]; or, from a file that
    holds no more, index_* and share_* [..., topk] and [..., topk - 1] in their places.
    """

    lasting = True

    def __init__(self, method: VBLoRA, site: Site, bank: Bank) -> None:
        super().__init__()
        w, draw = site.weight, normal(method.init_std)
        down, up = (method.r, w.d_in // method.length), (w.d_out // method.length, method.r)
        self.logits_down: nn.Parameter | None = parameter((*w.batch, *down, method.vectors), draw, w.like)
        self.logits_up: nn.Parameter | None = parameter((*w.batch, *up, method.vectors), draw, w.like)
        self.topk, self.dropout = method.topk, method.dropout
        self._bank = (bank,)  # in a tuple: it hangs at the model's root, once

    def sources(self) -> Iterator[nn.Module]:
        yield from (self, *self._bank)

    def top(self, side: str) -> tuple[Tensor, Tensor]:
        """The numbers of the vectors of each stretch [..., topk], and the weights of all but the last [..., topk - 1]."""
        logits: Tensor | None = getattr(self, f"logits_{side}")
        if logits is not None:
            largest, index = logits.topk(self.topk)
            return index, largest.softmax(-1)[..., :-1]
        if self._bank[0].vectors.requires_grad:
            do = "train from a save with resume=True (only_topk=False), or load it without trainable"
            raise GraftError(
                f"train the adapter at {self.key}", "its file holds no logits but the choice they made", do
            )
        return self.get_buffer(f"index_{side}").long(), self.get_buffer(f"share_{side}")

    def stretches(self, side: str) -> Tensor:
        """sum_j p_j V_j for each stretch, [..., length]."""
        index, share = self.top(side)
        share = torch.cat([share, 1 - share.sum(-1, keepdim=True)], dim=-1)  # as a file has them: the same bits
        return (share[..., None, :] @ self._bank[0].vectors[index]).squeeze(-2)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.stretches("down").flatten(-2), self.stretches("up").mT.flatten(-3, -2)

    def kept(self) -> dict[str, Tensor]:
        """What the factors are made of, beside the bank."""
        few = next(
            t for t in (torch.uint8, torch.int16, torch.int32) if len(self._bank[0].vectors) <= torch.iinfo(t).max
        )
        out: dict[str, Tensor] = {}
        for side in SIDES:
            with torch.no_grad():
                index, share = self.top(side)
            out |= {f"index_{side}": index.to(few), f"share_{side}": share.detach().clone()}
        return out

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the stored form, or the logits."""
        for side in SIDES if "index_down" in tensors else ():
            logits = getattr(self, f"logits_{side}")
            index = tensors.get(f"index_{side}", torch.empty(0))
            whole, most = not index.is_floating_point() and index.numel() > 0, len(self._bank[0].vectors)
            if logits is None or not whole or int(index.min()) < 0 or int(index.max()) >= most:
                found = f"index_{side} names vectors that the bank of {most} does not have, or none"
                raise GraftError(f"the tensors of {getattr(self, 'key', 'vblora')}", found, "restore the file")
            places = logits.shape[:-1]
            self.register_buffer(f"index_{side}", torch.zeros((*places, self.topk), dtype=index.dtype))
            self.register_buffer(f"share_{side}", logits.detach().new_zeros((*places, self.topk - 1)))
            setattr(self, f"logits_{side}", None)
        super().restore(tensors)
