"""A method of your own: W' = W * (1 + u v^T). It gets every host, merging, saving, the command line and the tests by existing.

graftwork --plugin examples/your_own_method.py train --method "gain()" ...     # pytest tests/conformance -k gain
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import graftwork as gw
from graftwork.core.adapter import Part
from graftwork.core.delta import WeightDelta
from graftwork.core.fields import where
from graftwork.core.initial import normal, zeros
from graftwork.core.method import Method, method
from graftwork.core.site import Site


@method("gain")
@dataclass(frozen=True)
class Gain(Method):
    """W' = W * (1 + u v^T),  u [out], v [in].  Identity at init (u = 0); mergeable.  Parameters: in + out per weight."""

    at: str = where("q, v | linear | conv")

    mergeable = True

    def build(self, site: Site, part: Part) -> RankOneGain:
        site.weight.require_matrix("gain")
        return RankOneGain(site)

    def count(self, site: Site) -> int:
        return site.weight.copies * (site.weight.d_in + site.weight.d_out)


class RankOneGain(WeightDelta):
    def __init__(self, site: Site) -> None:
        super().__init__()
        w = site.weight
        self.u, self.v = w.vector(w.d_out, zeros), w.vector(w.d_in, normal())

    def weight(self, w: Tensor) -> Tensor:
        return w * (1 + self.u.unsqueeze(-1) * self.v.unsqueeze(-2))


if __name__ == "__main__":
    model, x = torch.nn.Linear(20, 1), torch.randn(200, 20)
    adapter = gw.graft(model, Gain(at="linear"))
    optimiser = torch.optim.Adam(adapter.parameters(), lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        (model(x) - x[:, :1]).square().mean().backward()
        optimiser.step()
    y = model(x)
    gw.merge(model)
    print(adapter, "merged, largest difference", (model(x) - y).abs().max().item())
