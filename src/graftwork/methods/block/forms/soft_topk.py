"""Soft top-k: which k of n are chosen, as numbers between 0 and 1 that a gradient passes (see `coda`)."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(s: Tensor, k: int, eps: float) -> Tensor:
    """lambda [.., n] for scores s [.., n]: argmax of s^T l + eps H(l) over 0 <= l <= 1, sum l = k.

    lambda_i = min(1, exp((s_i + a) / eps)). With the j largest saturated, a = eps (log(k - j) - logsumexp_{i > j}(s_i / eps)); j is the
    smallest for which no other exceeds 1.
    """
    if k == s.shape[-1]:
        return torch.ones_like(s)
    ordered = (s / eps).sort(-1, descending=True).values
    tail = ordered.flip(-1).logcumsumexp(-1).flip(-1)[..., :k]
    shift = torch.arange(k, 0, -1, dtype=s.dtype, device=s.device).log() - tail  # a / eps for each j < k
    fits = ordered[..., :k] + shift <= 0
    fits = torch.cat([fits[..., :-1], torch.ones_like(fits[..., :1])], -1)  # the last always does, but for rounding
    j = fits.to(torch.uint8).argmax(-1, keepdim=True)
    return (s / eps + shift.gather(-1, j)).clamp(max=0).exp()


def iterated(s: Tensor, k: int, eps: float, rounds: int = 20, start: float = 4.0, decay: float = 0.7) -> Tensor:
    """The same by coordinate ascent on the duals, as published: for t = 1 .. rounds

        a = eps_t (log k - logsumexp((s + b) / eps_t)),   b = -relu(s + a),   lambda = exp((s + a + b) / eps),

    b = -s at first, eps_t = max(eps, start decay^(t - 1)). With few rounds and a small eps the sum is not k yet.
    """
    b, a, now = -s, torch.zeros_like(s[..., :1]), start
    for _ in range(rounds):
        now = max(now, eps)
        a = now * (torch.tensor(float(k), dtype=s.dtype).log().item() - ((s + b) / now).logsumexp(-1, keepdim=True))
        b = -(s + a).relu()
        last, now = now, now * decay
    return ((s + a + b) / last).exp()
