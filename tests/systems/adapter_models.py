"""Backbones for the checks of adapter methods: tiny ones with random weights, and the papers' own shapes on the meta
device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import graftwork as gw
from graftwork.core.adapter import Adapter
from graftwork.sites.where import select


def bert(layers: int = 2, **more) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, vocab_size=60, **more
    )
    return perturbed(BertForSequenceClassification(config)).eval()


def masked_bert(layers: int = 2, d: int = 32, **more) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, vocab_size=60,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip
    return perturbed(BertForMaskedLM(config)).eval()


def gpt2(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=layers, n_head=4, vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return perturbed(GPT2LMHeadModel(config)).eval()


def llama(layers: int = 2, **more) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return perturbed(LlamaForCausalLM(config)).eval()


def t5(layers: int = 2, **more) -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, num_layers=layers, num_heads=4, d_ff=64, vocab_size=60, pad_token_id=0,
        decoder_start_token_id=0, dropout_rate=0.0, **more,
    )  # fmt: skip
    return perturbed(T5ForConditionalGeneration(config)).eval()


def vit(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
    )
    return perturbed(ViTForImageClassification(config)).eval()


def perturbed(model: nn.Module) -> nn.Module:
    """Norms and biases away from one and zero, so that no check passes by their absence."""
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def ids(batch: int = 2, seq: int = 7, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 60, (batch, seq), generator=torch.Generator().manual_seed(seed))


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def spread(adapter: Adapter, std: float = 0.3) -> None:
    """Random values in the place of the initial ones."""
    generator = torch.Generator().manual_seed(11)
    for p in adapter.parameters():
        p.data = std * torch.randn(p.shape, generator=generator)


def closed_form(model: nn.Module, methods: Sequence[gw.Method]) -> int:
    """What the methods' formulas count, before anything is built."""
    found = gw.anatomy(model)
    total = 0
    for method in methods:
        sites = select(found, method.at, method.layers)
        total += sum(method.count(site) for site in sites) + method.count_shared(sites)
    return total


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()


def bert_of(size: str) -> nn.Module:
    shapes = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096)}
    d, layers, heads, ffn = shapes[size]
    config = BertConfig(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn)
    return on_meta(lambda: BertForSequenceClassification(config))


def t5_base() -> nn.Module:
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    return on_meta(lambda: T5ForConditionalGeneration(config))


def vit_base() -> nn.Module:
    return on_meta(lambda: ViTForImageClassification(ViTConfig()))


def bart_large() -> nn.Module:
    return on_meta(lambda: BartForConditionalGeneration(BartConfig()))


def llama_of(d: int, layers: int, heads: int, ffn: int) -> nn.Module:
    config = LlamaConfig(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn)
    return on_meta(lambda: LlamaForCausalLM(config))
