"""Tiny vision backbones with random weights for the checks of visual methods."""

from __future__ import annotations

import torch
import transformers as T
from adapter_models import perturbed
from torch import nn


def swin() -> nn.Module:
    """Two stages of two blocks, windows of 2 x 2, the second block of each shifted."""
    torch.manual_seed(0)
    config = T.SwinConfig(
        image_size=16, patch_size=2, num_channels=3, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2,
        drop_path_rate=0.0, num_labels=3,
    )  # fmt: skip
    return larger(T.SwinForImageClassification(config))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = T.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )  # fmt: skip
    return larger(T.ResNetForImageClassification(config))


def convnext() -> nn.Module:
    torch.manual_seed(0)
    config = T.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3)
    return larger(T.ConvNextForImageClassification(config))


def larger(model: nn.Module) -> nn.Module:
    """Weights that are large enough for attention to be far from uniform."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(3)
    return perturbed(model).eval()


def pictures(batch: int = 2, size: int = 8, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
