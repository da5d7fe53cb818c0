"""LoRETTA_adp: a series bottleneck whose two matrices are in tensor-train form.

Yang et al. 2024, "LoRETTA: Low-Rank Economic Tensor-Train Adaptation for Ultra-Low-Parameter Fine-Tuning of Large
Language Models", arXiv 2402.11417, section 3.2; yifanycc/loretta.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.fields import choice, positive, where
from graftwork.core.initial import parameter, uniform, zeros
from graftwork.core.method import Method, method, preset
from graftwork.core.site import Site

from ..weight.forms.tensor_train import TensorTrain, count, shape_of
from ..weight.full import Full
from .forms.nonlinear import ACTIVATIONS
from .forms.residual import Branch


@method("loretta_adp")
@dataclass(frozen=True)
class LoRETTAAdp(Method):
    """h + U(g(D h + b_D)) + b_U on the output h of a sub-layer,  D^T [d, bottleneck] and U^T [bottleneck, d] tensor
    trains of rank tt_rank.  Identity at init with "zero".

    bottleneck: the inner width.  act: g.  tt_rank: the inner ranks of the trains.
    init: every core as `tensor_train` says, b_D and b_U U(+-1/sqrt(width)); "zero" makes the last core of U and b_U
        zero, "released" does not, as the authors' code, whose first pass is not the backbone's.
    Parameters per site: sum_i r_{i-1} n_i r_i of both, and bottleneck + d; 6,360 for d = 4096.
    When: bottleneck adapters of which many are stored: their matrices as tensor trains.
    """

    bottleneck: int = positive(64)
    act: str = choice("tanh", *ACTIVATIONS)
    tt_rank: int = positive(5)
    init: str = choice("zero", "zero", "released")
    at: str = where("attn, mlp | linear | conv")

    sized_by = ("tt_rank",)
    lr = 5e-3

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """No factor is zero in the released initial values."""
        return self.init == "zero"

    def build(self, site: Site, part: Part) -> TrainBranch:
        return TrainBranch(self, site)

    def count(self, site: Site) -> int:
        d, m = site.d, self.bottleneck
        trains = sum(count(shape, self.tt_rank) for shape in (shape_of(d, m), shape_of(m, d)))
        return trains + d + m


class TrainBranch(Branch):
    """down = D^T, up = U^T, with their biases."""

    def __init__(self, method: LoRETTAAdp, site: Site) -> None:
        super().__init__("after", site)
        d, m, zero = site.d, method.bottleneck, method.init == "zero"
        like = site.like
        self.down = TensorTrain(d, m, shape_of(d, m), method.tt_rank, like)
        self.up = TensorTrain(m, d, shape_of(m, d), method.tt_rank, like, zero=zero)
        self.down_bias = parameter((m,), uniform(-(m**-0.5), m**-0.5), like)
        self.up_bias = parameter((d,), zeros if zero else uniform(-(d**-0.5), d**-0.5), like)
        self.act = method.act

    def branch(self, h: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.act](self.down(h) + self.down_bias)
        return self.up(inner) + self.up_bias


@preset("loretta")
def LoRETTA(
    bottleneck: int = 64, tt_rank: int = 5, act: str = "tanh", init: str = "zero", norms: bool = True
) -> list[Method]:
    """LoRETTA_adp behind attention and the feed-forward layer, and every layer norm of the backbone.

    bottleneck, tt_rank, act, init: of loretta_adp.  norms: the layer norms are trained with it.
    When: the paper's recipe: loretta_adp with the layer norms.
    """
    adapters = LoRETTAAdp(bottleneck=bottleneck, tt_rank=tt_rank, act=act, init=init, at="self.attn, mlp")
    return [adapters, Full(at="norm")] if norms else [adapters]
