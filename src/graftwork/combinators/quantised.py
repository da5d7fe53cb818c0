"""Quantised: an adapter whose matrices are trained, and stored, with one or a few bits a number.

Jie et al. 2023, "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy" (Bi-AdaptFormer,
Bi-LoRA), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import inner, number, positive
from graftwork.core.method import Method, get, method, preset
from graftwork.core.site import Site

from .coded import Coded, CodedDelta, CodedWeight
from .inherit import Around


@method("quantised")
@dataclass(frozen=True)
class Quantised(Around):
    """s q + mu in the place of every matrix W of the method inside,  mu = mean(W), s = std(W) (unbiased),
    q = the level nearest to (W - mu) / (s + 1e-5), of 2^bits levels.  Vectors (biases, norms) stay as they are.

    of: the method inside.  bits: 1 to 8.  W itself is trained: its gradient passes the rounding as if it were not there, and
    reaches mu and s too.  The levels suit N(0, 1), for one bit +-0.6745.
    std: a matrix that starts constant (zero: s would be 0) starts as a normal one of this standard deviation, cut at two of
    them, so that the model starts near the backbone and not at it.
    Stored: `bits` per number, and mu and s in float32 for each matrix; gw.save(..., resume=True) keeps W, to train on.
    Parameters: those of the method inside.  Source: Jie et al. 2023, arXiv 2307.16867; JieShibo/PETL-ViT (binary_adapter).
    When: any method's tensors shall be trained and stored in few bits.
    """

    of: Method = inner("lora")
    bits: int = positive(1)
    std: float = number(1e-3, low=0.0)

    identity = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits > 8 or not self.std:
            raise GraftError(f"{self}", f"bits={self.bits}, std={self.std}", "give 1 to 8 bits and std above 0")

    def build(self, site: Site, part: Part) -> Delta | None:
        delta = self.of.build(site, part)
        if delta is None:
            return None
        made = (CodedWeight if isinstance(delta, WeightDelta) else CodedDelta)()
        if isinstance(delta, WeightDelta):
            delta.place(site.key, site.weight)
        made.setup(delta, self.bits, self.std)
        return made

    def rate(self, tensor: str) -> float:
        return self.of.rate(tensor.removeprefix("delta."))

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        tensors = {key: delta.folded() for key, delta in part.deltas.items() if isinstance(delta, Coded)}
        return self, tensors, dict(part.shared_modules.state_dict())


@preset("bi_adapter")
def BiAdaptFormer(h: int = 32, bits: int = 1, scale: float = 0.1, dropout: float = 0.1) -> list[Method]:
    """x + MLP(x) + s_a W_u relu(W_d x) beside the MLP, W_d [h, d] and W_u [d, h] without biases, at `bits` bits a number.

    scale: s_a, searched in 0.01, 0.1, 1, 10.  Stored: 2 d h bits / 8 + 16 bytes per block.  Source: Jie et al. 2023.
    When: thousands of adapters must be stored: a wide bottleneck at one bit takes the place of a narrow one in floats.
    """
    inside = get("bottleneck")(
        d=h, act="relu", position="parallel", scale=scale, dropout=dropout, bias=False, init="lora", at="mlp"
    )
    return [Quantised(of=inside, bits=bits)]  # type: ignore[arg-type]


@preset("bi_lora")
def BiLoRA(r: int = 32, bits: int = 1, alpha: float = 32.0) -> list[Method]:
    """LoRA on q and v whose A [r, d] and B [d, r] have `bits` bits a number.  Source: Jie et al. 2023.

    When: as bi_adapter, where the result shall be merged.
    """
    return [Quantised(of=get("lora")(r=r, alpha=alpha, at="q, v"), bits=bits)]  # type: ignore[arg-type]
