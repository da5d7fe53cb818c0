"""Tiny models with random weights, the peer's adapters on them, and both loads side by side."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import graftwork as gw


class Net(nn.Module):
    """Convolutions, a norm, an embedding and linear layers, without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, (3, 1), stride=2)
        self.mid, self.last = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv1(pixels)))
        h = self.conv2(h).mean((2, 3)) + self.table(ids).mean(1)
        return self.last(torch.tanh(self.mid(h)))


class Heads(nn.Module):
    """torch's own attention, whose projections are read and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attn = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.attn(h, h, h, need_weights=False)[0])


SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
OPEN: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=48, num_key_value_heads=2, attention_bias=False, **SMALL)
    ),
    "biased": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=48, num_key_value_heads=2, attention_bias=True, mlp_bias=True, **SMALL)
    ),
    "tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=48, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    ),
    "wide": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=48, num_key_value_heads=2, **SMALL | {"hidden_size": 40})
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=48, max_position_embeddings=32, num_labels=3, **SMALL)
    ),
    "bert_mlm": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=48, max_position_embeddings=32, **SMALL)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=48, n_positions=32, n_embd=24, n_layer=2, n_head=4)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=48, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=48,
            d_model=24,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=48, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, **SMALL
        )
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=48,
            head_dim=8,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            pad_token_id=0,
            layer_types=["full_attention", "full_attention"],
            **SMALL,
        )
    ),
    "net": Net,
    "heads": Heads,
}


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _ids(high: int = 48, length: int = 7) -> Tensor:
    return torch.randint(3, high, (3, length), generator=torch.Generator().manual_seed(7))


def inputs(name: str) -> dict[str, Tensor]:
    """A batch of three for the model of this name."""
    if name == "net":
        return {"pixels": _draw(3, 3, 8, 8), "ids": _ids(20)}
    if name == "heads":
        return {"x": _draw(3, 7, 6)}
    if name == "vit":
        return {"pixel_values": _draw(3, 3, 8, 8)}
    if name == "whisper":
        return {"input_features": _draw(3, 8, 16), "decoder_input_ids": _ids()}
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": _ids(), "attention_mask": mask} | ({"decoder_input_ids": _ids()} if name == "t5" else {})


@functools.cache
def _made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OPEN[name]().eval()


def model(name: str) -> nn.Module:
    """A new copy of the model of this name."""
    return copy.deepcopy(_made(name))


@torch.no_grad()
def outputs(m: nn.Module, name: str) -> Tensor:
    """Its logits; of a peer with a prompt, those of the tokens."""
    out = m(**inputs(name))
    return (out if isinstance(out, Tensor) else out.logits)[:, -7:].clone()


@torch.no_grad()
def perturb(parameters: Any, seed: int = 1) -> None:
    """Move every parameter that is trained away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def peer(name: str, config: Any, moved: bool = True) -> nn.Module:
    """The model with an adapter of the peer's.  moved: away from its initial values."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        made = peft.get_peft_model(model(name), copy.deepcopy(config)).eval()
    if moved:
        perturb(made.parameters())
    return made


def written(made: nn.Module, folder: Path) -> Path:
    """The folder that the peer writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(str(folder))
    return folder


def read_by_peer(name: str, folder: Path) -> nn.Module:
    """The model with the adapter of this folder, loaded by the peer. Warnings of missing keys are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(model(name), str(folder)).eval()


def config_of(folder: Path) -> dict[str, Any]:
    """adapter_config.json without its version."""
    data = json.loads((folder / "adapter_config.json").read_text())
    data.pop("peft_version", None)
    return data


def loaded(name: str, folder: Path, **given: Any) -> nn.Module:
    """The model with the adapter of this folder, loaded here under the name "a"."""
    m = model(name)
    gw.load(m, folder, "a", **given)
    return m
