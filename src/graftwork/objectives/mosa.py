"""The loss of MoSA: two passes of a batch, each with an adapter drawn at random, must agree.

Zhang et al. 2023, "Split & Merge" (MoSA), arXiv 2312.02923, section 3.3; Theia-4869/MoSA.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mosa_loss(first: Tensor, second: Tensor, labels: Tensor, reg: float = 1.0, add_weight: float = 0.0) -> Tensor:
    """CE(p1, y) + add_weight CE(p2, y) + reg / 2 [KL(p1 || sg p2) + KL(p2 || sg p1)], sg without gradient; means over the batch, in nats.

    first, second: the logits of the two passes [batch, classes];  labels [batch].
    """
    loss = F.cross_entropy(first, labels)
    if add_weight:
        loss = loss + add_weight * F.cross_entropy(second, labels)
    return loss + reg / 2 * (divergence(first, second.detach()) + divergence(second, first.detach()))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two distributions given by their logits [batch, classes], the mean over the batch."""
    log_p = p.log_softmax(-1)
    return (log_p.exp() * (log_p - q.log_softmax(-1))).sum(-1).mean()
