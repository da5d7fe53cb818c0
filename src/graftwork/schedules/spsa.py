"""SPSA with gradient correction: training through forward passes alone.

Oh et al. 2023, "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning", arXiv 2303.14773, eq. 5 to 7 (Spall 1992 is plain
SPSA); changdaeoh/BlackVIP, trainers/blackvip.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import GraftError


class SPSA(torch.optim.Optimizer):
    """For step k = 1, 2, ...: a_k = a / (k + o)^alpha, c_k = c / k^gamma, and over all parameters phi together

        g = mean over `draws` of (L(phi + c_k delta) - L(phi - c_k delta)) / (2 c_k delta),  delta = +-u,  u ~ U[0.5, 1], fair signs
        m_1 = g,  m_k = b m_{k-1} + g,    phi <- phi - a_k (g + b m_k)

    b=0 is plain SPSA. It works for the parameters of any adapter, and for a model that can only be asked: `step(closure)` calls
    closure() -> loss 2 draws times without a graph, and gives the mean of these losses. No gradient is computed or read.
    generator: of delta, on the CPU; torch's own by default. Several processes must draw alike.
    """

    def __init__(
        self,
        params: Iterable[Any],
        a: float = 0.01,
        c: float = 0.01,
        o: float = 1.0,
        alpha: float = 0.4,
        gamma: float = 0.1,
        b: float = 0.9,
        draws: int = 5,
        generator: torch.Generator | None = None,
    ) -> None:
        if not (a > 0 and c > 0 and o >= 0 and alpha >= 0 and gamma >= 0 and 0 <= b < 1 and draws >= 1):
            found = f"a={a}, c={c}, o={o}, alpha={alpha}, gamma={gamma}, b={b}, draws={draws}"
            raise GraftError("SPSA", found, "give a, c > 0, o, alpha, gamma >= 0, b in [0, 1) and draws >= 1")
        self.draws, self.generator = draws, generator
        super().__init__(params, {"a": a, "c": c, "o": o, "alpha": alpha, "gamma": gamma, "b": b})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """One update. GraftError without a closure, or for a loss that is not finite; the parameters are then as before."""
        if closure is None:
            raise GraftError("SPSA.step()", "no closure", "give a function that computes the loss anew: step(closure)")
        moved = [(p, group) for group in self.param_groups for p in group["params"]]
        start = [p.clone() for p, _ in moved]
        counts = [self.state[p].get("step", 0) + 1 for p, _ in moved]
        sizes = [group["c"] / k ** group["gamma"] for (_, group), k in zip(moved, counts, strict=True)]
        estimates, total = [torch.zeros_like(p) for p in start], 0.0
        try:
            for _ in range(self.draws):
                deltas, losses = [self._delta(p) for p in start], []
                for sign in (1, -1):
                    for (p, _), old, size, delta in zip(moved, start, sizes, deltas, strict=True):
                        p.copy_(old + sign * size * delta)
                    losses.append(float(closure()))
                slope = losses[0] - losses[1]
                for g, size, delta in zip(estimates, sizes, deltas, strict=True):
                    g += slope / (2 * size * delta) / self.draws
                total += sum(losses) / (2 * self.draws)
        finally:
            for (p, _), old in zip(moved, start, strict=True):
                p.copy_(old)
        if total != total or abs(total) == float("inf"):
            raise GraftError("SPSA.step", f"a loss of {total}", "lower a or c")
        for (p, group), k, g in zip(moved, counts, estimates, strict=True):
            m = g if k == 1 else group["b"] * self.state[p]["momentum"] + g
            self.state[p].update(step=k, momentum=m)
            p.sub_(group["a"] / (k + group["o"]) ** group["alpha"] * (g + group["b"] * m))
        return total

    def _delta(self, like: Tensor) -> Tensor:
        """Entries +-u, u ~ U[0.5, 1]."""
        u = torch.rand(like.shape, generator=self.generator) / 2 + 0.5
        sign = torch.randint(0, 2, like.shape, generator=self.generator) * 2 - 1
        return (u * sign).to(like.device, like.dtype)
