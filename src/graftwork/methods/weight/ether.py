"""ETHER and ETHER+: the weight is reflected at trained hyperplanes, block by block.

Bini et al. 2024, "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections", section 3. Where the
released code for several blocks takes rows of W for blocks of its input (a reshape without a permutation), this is the
paper's block-diagonal H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.fields import choice, fraction, positive, where
from graftwork.core.initial import kaiming_uniform, values
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.core.weight import Weight

from .forms.multiplied import Multiplied, Pair, require_divisor


@method("ether")
@dataclass(frozen=True)
class ETHER(Method):
    """W' = W H,  H = blockdiag(H_1 .. H_n),  H_i = I - 2 u_i u_i^T / |u_i|^2,  u_i [in / n].  Mergeable.

    A reflection is never the identity: ||H - I|| = 2 sqrt(n), whatever is learned, so the start differs from the backbone.
    u starts kaiming-uniform.  blocks: n.  side: "input" as above; "output" for W' = H W, u_i [out / n]; "smaller" of the
    two.  An embedding is reflected at its vectors. The bias is not reflected.  dropout: on the input, in training only.
    Parameters: in per weight (out on that side), for every n.  Source: Bini et al. 2024, arXiv 2405.20271; mwbini/ether.
    When: learning rates cannot be tuned: a reflection has a fixed distance from the identity, so that training is robust over
        decades of rates.
    """

    blocks: int = positive(1)
    side: str = choice("input", "input", "output", "smaller")
    dropout: float = fraction(0.0)
    at: str = where("q, v | linear | conv")

    identity = False
    mergeable = True
    lr = 1e-2

    def build(self, site: Site, part: Part) -> Reflected:
        return _reflected(self, site, relaxed=False)

    def count(self, site: Site) -> int:
        return site.weight.copies * sum(_sizes(site.weight, self.side).values())


@method("ether_plus")
@dataclass(frozen=True)
class ETHERPlus(Method):
    """W' = H~ W H,  H_i = I - u_i u_i^T / |u_i|^2 + v_i v_i^T / |v_i|^2,  H~ alike with blocks of its own.  Identity at init (v = -u);
    mergeable.

    ||H_i - I|| <= sqrt(2), free below that.  u starts kaiming-uniform.  blocks: n, of either side.  side: "both" as above;
    "input" for W' = W H, "output" for H~ W, "smaller" of the two.  An embedding is changed at its vectors only. The bias is
    not changed.  dropout: on the input, in training only.
    Parameters: 2 (in + out) per weight, 2 in or 2 out on one side.  Source: Bini et al. 2024, arXiv 2405.20271, section 3.3.
    When: as ether, where a start at the backbone and a weaker, two-sided change are wanted.
    """

    blocks: int = positive(1)
    side: str = choice("both", "both", "input", "output", "smaller")
    dropout: float = fraction(0.0)
    at: str = where("q, v | linear | conv")

    mergeable = True
    lr = 1e-2

    def build(self, site: Site, part: Part) -> Reflected:
        return _reflected(self, site, relaxed=True)

    def count(self, site: Site) -> int:
        return site.weight.copies * 2 * sum(_sizes(site.weight, self.side).values())


def _sizes(w: Weight, side: str) -> dict[str, int]:
    """The sides that are reflected, with their sizes."""
    if side == "smaller":
        side = "input" if w.d_in <= w.d_out else "output"
    if w.lookup:
        side = "output"  # the vectors: the input is the vocabulary
    return {name: d for name, d in (("input", w.d_in), ("output", w.d_out)) if side in ("both", name)}


def _reflected(method: ETHER | ETHERPlus, site: Site, relaxed: bool) -> Reflected:
    w = site.weight
    w.require_matrix(method.name, method.dropout)
    sizes = _sizes(w, method.side)
    for size in sizes.values():
        require_divisor(f"{method} at {site.key}", method.blocks, size, "a number of blocks")
    sides = {name: Hyperplanes(w, method.blocks, size, relaxed) for name, size in sizes.items()}
    return Reflected(sides, method.dropout)


class Hyperplanes(nn.Module):
    """u [*batch, n, d / n], and v of the same shape where H is the relaxed one."""

    def __init__(self, w: Weight, blocks: int, d: int, relaxed: bool) -> None:
        super().__init__()
        self.u = w.parameter(blocks, d // blocks, kaiming_uniform())
        self.v = w.parameter(blocks, d // blocks, values(-self.u)) if relaxed else None
        self.rank = blocks * (2 if relaxed else 1)

    def pair(self) -> Pair:
        """P [*batch, d, k] and Q [*batch, k, d] with H = I + P Q."""
        u = _apart(self.u)
        if self.v is None:
            return -2 * u.mT, u
        v = _apart(self.v)
        return torch.cat([-u, v], -2).mT, torch.cat([u, v], -2)


def _apart(vectors: Tensor) -> Tensor:
    """The n vectors [*batch, n, d / n], each of length one, as rows [*batch, n, d] that are zero outside of their blocks."""
    eye = torch.eye(vectors.shape[-2], dtype=vectors.dtype, device=vectors.device)
    return (eye[..., None] * F.normalize(vectors, dim=-1)[..., None, :, :]).flatten(-2)


class Reflected(Multiplied):
    """input, output: the hyperplanes of a side, where it has some."""

    def __init__(self, sides: dict[str, Hyperplanes], dropout: float) -> None:
        super().__init__(sum(side.rank for side in sides.values()), dropout)
        self.input, self.output = sides.get("input"), sides.get("output")

    def right(self) -> Pair | None:
        return None if self.input is None else self.input.pair()

    def left(self) -> Pair | None:
        return None if self.output is None else self.output.pair()
