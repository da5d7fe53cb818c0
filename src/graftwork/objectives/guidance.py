"""The guidance scale that a guidance-distilled model is fed: off in training, the user's own in evaluation.

Yu et al. 2025, "Ultra-Resolution Adaptation with Ease", section 3.3: fine-tuning such a model at g > 1 trains towards a target
that was guided once already.
"""

from __future__ import annotations

from torch import nn


def guidance(model: nn.Module, scale: float, trained: float = 1.0) -> float:
    """g to feed to the model in its present mode: `trained` where it trains, otherwise `scale`."""
    return trained if model.training else scale
