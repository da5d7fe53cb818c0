"""A difference to every chosen number of the backbone, that a schedule makes sparse: what LT-SFT and diff pruning share.

In a first phase all of it is trained. Then one mask over all sites keeps the largest differences, and only these go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from graftwork.core.delta import WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.initial import parameter, zeros
from graftwork.core.plan import Host
from graftwork.core.site import Site


class Difference(WeightDelta):
    """change [*batch, out, in] or [d], as the site's weight;  shift [out], of its bias where it has one.

    masks: by name, all True until the schedule has settled them; what is outside of them stays 0, whatever an optimiser does to
    the tensors. settled: they are set, which `done` tells a file.
    """

    lasting = True

    done: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.change = parameter(w.shape, zeros, w.like)
        self.shift = parameter((w.d_out,), zeros, w.like) if _has_bias(site) else None
        self.masks, self.settled = nn.Module(), False
        for name, p in self.tensors().items():
            self.masks.register_buffer(name, torch.ones(p.shape, dtype=torch.bool, device=p.device))
        self.register_buffer("done", torch.zeros((), dtype=torch.bool, device="cpu"))

    def tensors(self) -> dict[str, nn.Parameter]:
        """The dense differences by name."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def value(self, name: str) -> Tensor:
        """What is added to the weight ("change") or to the bias ("shift")."""
        return self.tensors()[name] * self.masks.get_buffer(name) if self.settled else self.dense(name)

    def dense(self, name: str) -> Tensor:
        """The same in the first phase, before there is a mask."""
        return self.tensors()[name]

    def update(self) -> Tensor:
        return self.value("change")

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.shift is None else b + self.value("shift")

    def overrides(self, function: str) -> bool:
        return self.shift is not None if function == "bias" else super().overrides(function)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor], host: Host) -> Tensor:
        y = super().linear(x, base, host)
        return y if self.shift is None else y + self.value("shift").to(y.dtype)

    @torch.no_grad()
    def settle(self, name: str, mask: Tensor, values: Tensor) -> None:
        """Keep `values` where the mask is, for good."""
        p = self.tensors()[name]
        kept = self.masks.get_buffer(name).copy_(mask)
        p.copy_(torch.where(kept, values.to(p), 0))
        self.settled = bool(self.done.fill_(True))

    @property
    def pruned(self) -> int:  # type: ignore[override]
        """Numbers that the masks hold at 0."""
        return sum(m.numel() - int(m.sum()) for m in self.masks.buffers()) if self.settled else 0

    def folded(self) -> dict[str, Tensor]:
        """The stored form: flat places and values of what the mask keeps; before there is one, all of it."""
        if not self.settled:
            return {name: p.detach() for name, p in self.tensors().items()}
        out: dict[str, Tensor] = {}
        for name, p in self.tensors().items():
            out |= folded_places(name, p.detach(), self.masks.get_buffer(name))
        return out

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the stored form, or the unfolded one with its masks."""
        dense = dict(tensors)
        for name, p in self.tensors().items():
            if f"index.{name}" in dense:
                dense[name], dense[f"masks.{name}"] = spread_places(dense, name, p.shape, self.key)
                dense["done"] = torch.ones((), dtype=torch.bool)
            elif f"masks.{name}" not in dense:
                dense |= {
                    f"masks.{name}": torch.ones(p.shape, dtype=torch.bool),
                    "done": torch.zeros((), dtype=torch.bool),
                }
        super().restore(dense)
        self.settled = bool(self.done)


def size(site: Site) -> int:
    """How many numbers a site has: its weight's, and its bias's."""
    return math.prod(site.weight.shape) + (site.weight.d_out if _has_bias(site) else 0)


def _has_bias(site: Site) -> bool:
    w = site.weight
    return w.bias is not None and not w.batch and site.module._parameters[w.bias] is not None


def budget(k: int | None, density: float, sites: Sequence[Site]) -> int:
    """K, or the share `density` of all numbers of the sites. GraftError for more than there are, or none."""
    whole = sum(size(site) for site in sites)
    kept = int(density * whole + 1e-9) if k is None else k
    if not 0 < kept <= whole:
        raise GraftError(f"keep {kept:,} differences", f"the sites have {whole:,} numbers", "give another k or density")
    return kept


def folded_places(name: str, dense: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """A dense tensor as a file holds it: "index.name", the flat places of the mask, rising, and "value.name"."""
    at = mask.flatten().nonzero().flatten()
    kind = torch.int32 if dense.numel() < 2**31 else torch.int64
    return {f"index.{name}": at.to(kind), f"value.{name}": dense.flatten()[at]}


def spread_places(tensors: dict[str, Tensor], name: str, shape: torch.Size, key: str) -> tuple[Tensor, Tensor]:
    """The dense tensor and its mask, of what a file holds, which is taken out of `tensors`. GraftError where it fits no such shape."""
    index, value = tensors.pop(f"index.{name}").long(), tensors.pop(f"value.{name}", torch.empty(0))
    inside = not len(index) or (int(index[0]) >= 0 and int(index[-1]) < shape.numel())
    if index.shape != value.shape or not inside or bool((index.diff() <= 0).any()):
        found = f"{list(index.shape)} places for {list(value.shape)} values of {list(shape)}"
        raise GraftError(f"the tensor {name!r} of {key}", found, "restore the file")
    dense, mask = value.new_zeros(shape.numel()), torch.zeros(shape.numel(), dtype=torch.bool)
    dense[index], mask[index] = value, True
    return dense.view(shape), mask.view(shape)


def largest(sizes: Iterable[Tensor], k: int) -> list[Tensor]:
    """Masks of the k largest numbers > 0 of all tensors together, shaped as these."""
    sizes = list(sizes)
    flat = torch.cat([s.flatten().float().cpu() for s in sizes])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(min(k, len(flat))).indices] = True
    parts = (mask & (flat > 0)).split([s.numel() for s in sizes])
    return [part.view(s.shape) for part, s in zip(parts, sizes, strict=True)]
