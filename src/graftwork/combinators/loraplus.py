"""LoRA+: a larger learning rate for the factor at the output.

Hayou, Ghosh and Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.fields import inner, number
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .inherit import Around


@method("loraplus")
@dataclass(frozen=True)
class LoRAPlus(Around):
    """lr_B = ratio lr_A for the factors of the method inside; the model and what is stored are those of the method inside.

    of: a method with a factor at the input (A) and one at the output (B), such as lora, dora.
    ratio: of the learning rate of B, and of vectors (magnitudes, biases), to that of A.
    embedding: of the learning rate of the factors at embeddings to that of A (published: 1e-6, where A has 1e-4).
    The rates are those of `adapter.groups(lr, weight_decay)`, and of graftwork train; lr is about half of plain LoRA's.
    Parameters: those of the method inside.  Source: Hayou et al. 2024, section 4 and nikhil-ghosh-berkeley/loraplus.
    When: LoRA learns slowly on wide models: B gets a higher rate than A, at no cost.
    """

    of: Method = inner("lora")
    ratio: float = number(16.0, low=1.0)
    embedding: float = number(0.01, low=0.0)

    meets_needs = True

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """As the method inside."""
        return self.of.needs

    @property
    def lr(self) -> float:  # type: ignore[override]
        """That of A: the geometric mean of both is the method's own."""
        return self.of.lr / math.sqrt(self.ratio)

    def build(self, site: Site, part: Part) -> Delta | None:
        return self.of.build(site, part)

    def rate(self, tensor: str) -> float:
        return self.of.rate(tensor)

    def rate_of(self, role: str) -> float:
        return {"up": self.ratio, "scale": self.ratio, "embedding": self.embedding}.get(role, 1.0)

    def step(self, part: Part, progress: float) -> None:
        self.of.step(part, progress)

    def calibrating(self, part: Part) -> None:
        self.of.calibrating(part)

    def observe(self, part: Part, loss: Tensor) -> None:
        self.of.observe(part, loss)

    def calibrate(self, part: Part) -> None:
        self.of.calibrate(part)

    def calibrated(self, part: Part) -> bool | None:
        return self.of.calibrated(part)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The stored form of the method inside: how it was trained is not part of what it computes."""
        stored, tensors, shared = self.of.fold(part)
        return replace(stored, at=self.at, layers=self.layers), tensors, shared
