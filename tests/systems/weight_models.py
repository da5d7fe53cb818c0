"""Backbones for the checks of weight methods: single layers of every kind, a mixture of experts, the papers' shapes."""

from __future__ import annotations

import torch
from adapter_models import closed_form, on_meta, perturbed, spread
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import graftwork as gw


class Around(nn.Module):
    """A model of one layer, `site`, and a linear one behind it, `last`."""

    def __init__(self, site: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.site, self.last = site, last if last is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.site(x))


class Attention(nn.Module):
    """nn.MultiheadAttention over one input."""

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(d, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def around(site: nn.Module, last: nn.Module | None = None) -> nn.Module:
    return perturbed(Around(site, last)).eval()


def gpt2(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=60, bos_token_id=1, eos_token_id=2)
    return perturbed(GPT2LMHeadModel(config)).eval()


def mixtral(layers: int = 1, experts: int = 4, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=60, num_local_experts=experts, num_experts_per_tok=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        experts_implementation=implementation,
    )  # fmt: skip
    return perturbed(MixtralForCausalLM(config)).eval()


def roberta_of(size: str) -> nn.Module:
    d, layers, heads, ffn = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096)}[size]
    config = RobertaConfig(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn)
    return on_meta(lambda: RobertaForSequenceClassification(config))


def deberta_v3_base() -> nn.Module:
    config = DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], max_relative_positions=-1, position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    return on_meta(lambda: DebertaV2ForSequenceClassification(config))


def gpt3() -> nn.Module:
    """The 175B shape: 96 layers of width 12288, q, k and v packed."""
    return on_meta(lambda: GPT2LMHeadModel(GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)))


def t0(size: str) -> nn.Module:
    d, heads, ffn = {"3b": (2048, 32, 5120), "11b": (4096, 64, 10240)}[size]
    config = T5Config(
        d_model=d, d_kv=64, num_heads=heads, d_ff=ffn, num_layers=24, num_decoder_layers=24,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return on_meta(lambda: T5ForConditionalGeneration(config))


def counts(model: nn.Module, method: gw.Method) -> tuple[int, int]:
    """Parameters of the adapter that `method` makes on `model`, and what its closed formula says before that."""
    said = closed_form(model, [method])
    adapter = gw.graft(model, method, head=False)
    made = adapter.num_parameters
    gw.remove(model, adapter.name)
    return made, said


def dense(model: nn.Module, key: str) -> Tensor:
    """The dense [out, in] weight of the site `key`, the backbone's own."""
    site = next(s for s in gw.anatomy(model).sites if s.key == key)
    return site.weight.dense(site.module._parameters[site.weight.name])


def layer(method, d_in=8, d_out=12):
    """One linear layer with the method: the model, its delta, an input; the parameters away from their start."""
    torch.manual_seed(0)
    model = around(nn.Linear(d_in, d_out))
    adapter = gw.graft(model, method, head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    return model, delta, torch.randn(4, d_in)
