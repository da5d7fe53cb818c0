"""The delta of a quantised adapter: the delta inside, run with its matrices rounded to a few levels (see `quantised`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graftwork.core.adapter import quoted
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.initial import tensor, truncated_normal

from .bits import packed, unpacked
from .codes import coded, decoded, levels
from .substituted import Substituted


class Coded(Substituted):
    """Mixin of the two kinds. delta: the one inside, with the matrices that are trained, or, from a file (`final`), those that the
    codes stand for, which are not rounded again."""

    delta: Delta

    def setup(self, delta: Delta, bits: int, std: float) -> None:
        self.delta, self.bits, self.final = delta, bits, nn.Module()
        self.like(delta)
        self.lasting = isinstance(delta, WeightDelta) and delta.lasting
        levels(bits)  # known before the first pass
        if not self.matrices():
            raise GraftError(
                f"quantise {type(delta).__name__}", "it has no matrices", "choose a method that trains some"
            )
        for name, p in self.matrices().items():
            if p[0].numel() * len(p) < 2:
                raise GraftError(f"quantise the matrix {name!r}", "one number", "leave this site out")
            if not p.is_meta and p.dim() and bool((p == p.flatten()[0]).all()):
                p.data = tensor(tuple(p.shape), truncated_normal(std), p)

    def tensors(self) -> dict[str, Tensor]:
        if not self.final._buffers:
            return {name: self.rounded(w) for name, w in self.matrices().items()}
        if self.training and torch.is_grad_enabled() and any(w.requires_grad for w in self.matrices().values()):  # type: ignore[attr-defined]
            found = "its file holds the codes alone"
            raise GraftError(
                "train a quantised adapter", found, "save it with resume=True, which keeps what is trained"
            )
        return {}

    def rounded(self, w: Tensor) -> Tensor:
        """q s + mu: rounding passes the gradient of its input on; mu and s have theirs."""
        codes, mu, s, unit = coded(w, self.bits)
        q = levels(self.bits).to(unit)[codes.long()] + (unit - unit.detach())  # the last is zero, to the bit
        return (q * s + mu).to(w.dtype)

    def folded(self) -> dict[str, Tensor]:
        """The stored form: for each matrix "codes.name" and "stats.name" [2, *batch], mu and s; the others as they are."""
        out = {}
        for name, value in self.delta.state_dict().items():
            if name not in self.matrices():
                out[f"delta.{name}"] = value
            elif self.final._buffers:
                out |= {
                    f"{kind}.{name}": self.final.get_buffer(quoted(f"{kind}.{name}")) for kind in ("codes", "stats")
                }
            else:
                codes, mu, s, _ = coded(value, self.bits)
                out |= {f"codes.{name}": packed(codes, self.bits), f"stats.{name}": torch.stack([mu, s])}
        return out

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the stored form, or the unfolded one."""
        dense = {k.removeprefix("delta."): v for k, v in tensors.items() if k.startswith("delta.")}
        for name, w in self.matrices().items():
            codes, stats = tensors.get(f"codes.{name}"), tensors.get(f"stats.{name}")
            if codes is None or stats is None:
                continue
            found_codes = unpacked(codes, w.shape, self.bits)
            if found_codes is None:
                found = f"{len(codes)} bytes for {list(w.shape)}"
                raise GraftError(
                    f"the tensor {name!r} of {getattr(self, 'key', 'an adapter')}", found, "restore the file"
                )
            mu, s = stats
            dense[name] = decoded(found_codes, mu, s, self.bits)
            for kind, value in (("codes", codes), ("stats", stats)):
                self.final.register_buffer(quoted(f"{kind}.{name}"), value.clone())
        if any(w.is_meta for w in self.matrices().values()):
            self.delta.to_empty(device="cpu")
        self.delta.restore(dense)


class CodedDelta(Coded, Delta):  # type: ignore[misc]
    """A quantised activation delta."""


class CodedWeight(Coded, WeightDelta):  # type: ignore[misc]
    """A quantised weight delta."""
