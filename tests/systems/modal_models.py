"""Backbones beyond text for the checks of adapter methods: tiny ones with random weights, and papers' own shapes on the meta device."""

from __future__ import annotations

import torch
from adapter_models import on_meta, perturbed
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)


def swin() -> nn.Module:
    torch.manual_seed(0)
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return perturbed(SwinForImageClassification(config)).eval()


def convnext() -> nn.Module:
    """Norms over channels that are first in one place and last in another; no BatchNorm."""
    torch.manual_seed(0)
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2, image_size=16)
    return perturbed(ConvNextForImageClassification(config)).eval()


def clip() -> nn.Module:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    text = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 60, "max_position_embeddings": 16, **shape}
    vision = {"hidden_size": 24, "intermediate_size": 48, "image_size": 8, "patch_size": 4, **shape}
    return perturbed(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))).eval()


def speech() -> nn.Module:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=[16, 16],
        conv_kernel=[10, 3], conv_stride=[5, 2], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
    )  # fmt: skip
    return perturbed(Wav2Vec2ForSequenceClassification(config)).eval()


def bart(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = BartConfig(
        d_model=32, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=60, max_position_embeddings=32, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return perturbed(BartForConditionalGeneration(config)).eval()


def pictures(size: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def sound(batch: int = 2, samples: int = 400) -> Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(3))


def vit_of(labels: int) -> nn.Module:
    return on_meta(lambda: ViTForImageClassification(ViTConfig(num_labels=labels)))


def clip_of(size: str) -> nn.Module:
    """ViT-B/16 or ViT-L/14 with its text encoder."""
    shapes = {"base": ((768, 12, 12, 16), (512, 8)), "large": ((1024, 24, 16, 14), (768, 12))}
    (d, layers, heads, patch), (d_text, text_heads) = shapes[size]
    vision = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * d}
    text = {"hidden_size": d_text, "num_attention_heads": text_heads, "intermediate_size": 4 * d_text}
    return on_meta(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config={**vision, "patch_size": patch})))
