"""Small random convolutional models, with norms and statistics away from their initial values."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import nn


def resnet(layers: str = "bottleneck", seed: int = 0, **more: Any) -> nn.Module:
    """Two stages of two blocks, the second with stride 2."""
    given = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "num_labels": 4, **more}
    torch.manual_seed(seed)
    return varied(T.ResNetForImageClassification(T.ResNetConfig(layer_type=layers, **given)))


def convnext(seed: int = 0) -> nn.Module:
    """Two stages of two blocks, with a downsampling convolution between them."""
    torch.manual_seed(seed)
    config = T.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, num_labels=4)
    return varied(T.ConvNextForImageClassification(config))


def varied(model: nn.Module) -> nn.Module:
    """Vectors and running statistics that are not zero and one, so that no check passes by their absence."""
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.2 * torch.randn(p.shape, generator=generator)
    for name, t in model.named_buffers():
        if name.endswith("running_mean"):
            t += 0.3 * torch.randn(t.shape, generator=generator)
        if name.endswith("running_var"):
            t *= 0.5 + torch.rand(t.shape, generator=generator)
    return model.eval()


def images(batch: int = 2, size: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).logits
