"""LoHa: the update is the elementwise product of two low-rank products, so that its rank can be r^2.

Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", proposition 1 (the
product) and 3 (kernels); as an adapter: KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from graftwork.core.adapter import Part
from graftwork.core.fields import choice, flag, fraction, number, rank, where
from graftwork.core.initial import Initial, kaiming_uniform, normal, parameter, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site
from graftwork.core.weight import Weight

from .forms.dropouts import Dropouts
from .forms.hadamard import Hadamard


@method("loha")
@dataclass(frozen=True)
class LoHa(Method):
    """W' = W + s (B1 A1) * (B2 A2), * elementwise,  A_i [r, in],  B_i [out, r],  s = alpha / r.  Identity at init; mergeable.

    effective: a convolution has cores t1, t2 [r, r, *kernel] and A_i [r, in / groups]: the kernel at (o, i) is the product of
        sum_{p, q} t_i[p, q] B_i[o, p] A_i[q, i] (i = 1, 2); a kernel of size 1 needs none. By default its weight is the matrix
        [out, in / groups * kernel].
    rank_dropout, module_dropout: see `Dropouts`.
    init: "kaiming" A_i, B_i and t_i kaiming-uniform (a = sqrt 5), A2 zero; "lycoris" A_i N(0, 1), B1 and t_i N(0, 0.01), B2 zero.
    Parameters: 2 r (in + out) per weight; effective 2 r (in / groups + out) + 2 r^2 |kernel|.
    Source: Hyeon-Woo et al. 2022, arXiv 2108.06098, propositions 1 and 3; KohakuBlueleaf/LyCORIS.
    When: diffusion models and other hosts of convolutions, where the community shares such files; a higher rank than LoRA of
        equal count.
    """

    r: int = rank(8)
    alpha: float = number(8.0)
    rank_dropout: float = fraction(0.0)
    module_dropout: float = fraction(0.0)
    effective: bool = flag(False)
    init: str = choice("kaiming", "kaiming", "lycoris")
    at: str = where("q, v | linear | conv")

    mergeable = True
    lr = 1e-2

    def build(self, site: Site, part: Part) -> Hadamard:
        w = site.weight
        w.require_matrix("loha")
        kernel = self.kernel(w)
        d_in = w.d_in // math.prod(kernel)
        kaiming = self.init == "kaiming"
        up = (
            kaiming_uniform(fan_in=w.d_out if kernel else self.r) if kaiming else normal(0.1)
        )  # with a core, B is drawn as [r, out]
        down, last = (kaiming_uniform(), zeros) if kaiming else (normal(), normal())

        def pair(b: Initial, a: Initial) -> tuple[nn.Parameter, nn.Parameter]:
            return w.parameter(w.d_out, self.r, b), w.parameter(self.r, d_in, a)

        cores = None
        if kernel:
            shape, init = (
                (self.r, self.r, *kernel),
                kaiming_uniform(fan_in=self.r * math.prod(kernel)) if kaiming else normal(0.1),
            )
            cores = parameter(shape, init, w.like), parameter(shape, init, w.like)
        dropouts = Dropouts(self.rank_dropout, module=self.module_dropout)
        two = pair(up if kaiming else zeros, last)
        return Hadamard(pair(up, down), two, self.alpha / self.r, dropouts=dropouts, cores=cores)

    def kernel(self, w: Weight) -> tuple[int, ...]:
        """The kernel that cores stand for at this weight; () where there are none."""
        return w.kernel if self.effective and math.prod(w.kernel) > 1 else ()

    def count(self, site: Site) -> int:
        w, kernel = site.weight, self.kernel(site.weight)
        k = math.prod(kernel)
        return w.copies * 2 * self.r * (w.d_in // k + w.d_out) + (2 * self.r**2 * k if kernel else 0)
