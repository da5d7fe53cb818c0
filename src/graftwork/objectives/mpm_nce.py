"""MPM-NCE: a contrastive loss of image and text vectors with several positives, smoothed targets and a margin.

Kim et al. 2024, "Efficient and Versatile Robust Fine-Tuning of Zero-shot Models" (R-Adapter), arXiv 2408.05749, section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import GraftError


def mpm_nce(
    f: Tensor,
    g: Tensor,
    positives: Tensor | None = None,
    margin: float = 0.05,
    temperature: float = 0.01,
    smoothing: float = 0.0,
) -> Tensor:
    """- sum_ij [t_ij log softmax_k((f_i . g_k + m_ik) / tau)_j + t_ji log softmax_k((f_k . g_i + m_ki) / tau)_j], a scalar in nats.

    f, g: images and texts [batch, d], normalised here.  positives: y [batch, batch], True where g_j goes with f_i; the pairs
    themselves unless given. With P(i) the positives of i and e the smoothing, t_ij = (1 - e) y_ij / |P(i)| + e (1 - y_ij) /
    (batch - |P(i)|), and m_ij = 0 where y_ij, otherwise the margin: a negative must be farther away by it.
    One positive each, e = 0 and no margin: the symmetric InfoNCE, summed over the batch.
    Raises GraftError for shapes that do not fit, and for a row without a positive.
    """
    n = len(f)
    y = torch.eye(n, device=f.device) if positives is None else positives.to(f.dtype)
    if f.dim() != 2 or g.shape != f.shape or y.shape != (n, n):
        found = f"{list(f.shape)}, {list(g.shape)} and {list(y.shape)}"
        raise GraftError("mpm_nce", found, "give two tensors [batch, d] and positives [batch, batch]")
    per_row = y.sum(1, keepdim=True)
    if not (per_row > 0).all():
        raise GraftError("mpm_nce", "a row without a positive", "mark at least one in each row of positives")
    target = (1 - smoothing) * y / per_row + smoothing * (1 - y) / (n - per_row).clamp_min(1)
    logits = (F.normalize(f, dim=-1) @ F.normalize(g, dim=-1).T + margin * (1 - y)) / temperature
    return -(target * logits.log_softmax(1)).sum() - (target * logits.log_softmax(0)).sum()
