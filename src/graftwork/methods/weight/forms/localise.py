"""Where in a weight a block of rows and columns matters most: sensitivity, and three greedy rules.

Wang et al. 2025, "LoSiA: Efficient High-Rank Fine-Tuning via Subnet Localization and Optimization", section 3.2.
"""

from __future__ import annotations

from torch import Tensor


def sensitivity(q: Tensor, taylor: str) -> Tensor:
    """i of q = W g: how much the loss changes without a number, to the second order of its own gradient."""
    return {"mixed": lambda: (q - q.square() / 2).abs(), "first": q.abs, "second": q.square}[taylor]()


def candidates(q: Tensor, r: int, c: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of q [out, in] by the three rules: both at once, rows first, columns first."""
    rows, columns = _top(q.sum(1), r), _top(q.sum(0), c)
    return [(rows, columns), (rows, _top(q[rows].sum(0), c)), (_top(q[:, columns].sum(1), r), columns)]


def largest_block(q: Tensor, r: int, c: int) -> tuple[Tensor, Tensor]:
    """The one of them with the largest sum of q."""
    return max(candidates(q.float(), r, c), key=lambda at: float(q.float()[at[0]][:, at[1]].sum()))


def _top(sums: Tensor, k: int) -> Tensor:
    return sums.topk(k).indices.sort().values
