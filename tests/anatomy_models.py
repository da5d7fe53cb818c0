"""Models of the anatomy tests, on the meta device with few layers: nothing is computed, nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

SETTINGS: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 2},
    "albert": {"num_hidden_layers": 3},
    "gpt2": {"n_layer": 2},
    "gpt_bigcode": {"n_layer": 1},
    "gpt_neox": {"num_hidden_layers": 1},
    "phi3": {"num_hidden_layers": 1, "num_key_value_heads": 8},
    "codegen": {"n_layer": 1},
    "llama": {"num_hidden_layers": 2, "num_key_value_heads": 8},
    "t5": {"num_layers": 2},
    "bart": {"encoder_layers": 2, "decoder_layers": 3},
    "whisper": {"encoder_layers": 2, "decoder_layers": 2},
    "vit": {"num_hidden_layers": 2},
    "clip": {},
    "swin": {},
    "convnext": {},
    "resnet": {},
    "mixtral": {"num_hidden_layers": 2},
    "gpt_oss": {"num_hidden_layers": 1},
    "deepseek_v3": {"num_hidden_layers": 4},
    "nllb-moe": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": 3,
    },
    "longcat_flash": {"num_layers": 1},
    "swinv2": {},
    "siglip_vision_model": {"num_hidden_layers": 1},
    "blt": {},
}


@cache
def meta(name: str, kind: str = "AutoModel") -> nn.Module:
    import transformers

    config = transformers.CONFIG_MAPPING[name](**SETTINGS.get(name, {}))
    with torch.device("meta"):
        return getattr(transformers, kind).from_config(config)
