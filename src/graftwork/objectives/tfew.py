"""The loss of T-Few: a language-model term, an unlikelihood term, and a length-normalised choice among the answers.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", eq. 1 to 3;
r-three/t-few, EncoderDecoder.py. Where that code lets padding into the unlikelihood term, this does not.

Shapes: nll [batch, choices, tokens], the negative log-likelihood of each token of each choice;  real [batch, choices,
tokens], True where a token is no padding (a choice without one does not exist);  label [batch], the index of the right
choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-2  # added to 1 - p, so that a wrong token of probability one costs a finite amount


@dataclass(frozen=True)
class TFewLoss:
    """The three terms, each a scalar, in nats."""

    lm: Tensor
    unlikelihood: Tensor
    choice: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, which the paper trains on."""
        return self.lm + self.unlikelihood + self.choice


def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of each token.  logits [..., tokens, vocabulary], tokens [..., tokens] -> [..., tokens]."""
    return F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten(), reduction="none").view(tokens.shape)


def choice_scores(nll: Tensor, real: Tensor, length_norm: float = 1.0) -> Tensor:
    """s(c) = -sum_t nll_t(c) / len(c)^length_norm, [batch, choices]; minus infinity where there is no choice."""
    length = real.sum(-1)
    score = -torch.where(real, nll, 0).sum(-1) / length.clamp_min(1).to(nll.dtype).pow(length_norm)
    return score.masked_fill(length == 0, float("-inf"))


def predict(nll: Tensor, real: Tensor, length_norm: float = 1.0) -> Tensor:
    """The choice with the highest score, [batch]."""
    return choice_scores(nll, real, length_norm).argmax(-1)


def tfew_loss(nll: Tensor, real: Tensor, label: Tensor, length_norm: float = 1.0) -> TFewLoss:
    """L_LM, the mean over the right choices' tokens;  L_UL, the mean of -log(1 - p + 0.01) over the wrong ones' tokens;
    L_LN, the cross-entropy of the right choice under softmax_c s(c).
    """
    right = F.one_hot(label, nll.shape[1]).bool()[..., None] & real
    wrong = ~right & real
    lm = torch.where(right, nll, 0).sum() / right.sum().clamp_min(1)
    p = (-nll.masked_fill(~wrong, float("inf"))).exp()
    unlikely = torch.where(wrong, -torch.log(1 - p + FLOOR), 0).sum() / wrong.sum().clamp_min(1)
    return TFewLoss(lm, unlikely, F.cross_entropy(choice_scores(nll, real, length_norm), label))
