"""Every kind of module a method can sit on, as small deterministic models with an input and an output.

A host's weights are drawn from one seed, so that another process builds the same one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Net(nn.Module):
    """first -> site -> last; `site` is the module under test."""

    def __init__(self, first: nn.Module, site: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.site, self.last = first, site, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.site(self.first(x))))


class Reader(Net):
    """Reads the site's weight around the module."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(F.linear(self.first(x), self.site.weight, self.site.bias)))


class PackedBlock(nn.Module):
    """A pre-norm attention block with one packed projection."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attn, self.heads = nn.LayerNorm(d), nn.Module(), heads
        self.attn.qkv, self.attn.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.attn.proj(out.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on one input, with a head."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.first, self.attn, self.last = (
            nn.Linear(d, d),
            nn.MultiheadAttention(d, heads, batch_first=True),
            nn.Linear(d, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.attn(h, h, h, need_weights=False)[0])


class ConvNet(nn.Module):
    """Convolutions, each with a batch norm behind it, whose statistics are not those of the start."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.last_norm = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)
        for norm in (self.norm, self.last_norm):
            norm.running_mean.normal_(0.0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = torch.relu(self.last_norm(self.conv(h)))
        return self.head(self.pool(h).flatten(1))


@dataclass(frozen=True)
class Host:
    """A kind of module that a method can sit on.

    make: the model, with its random weights;  inputs: of a batch of 3;  at: the sites, None for the method's default;
    whole: a model with repeated blocks;  calls: the sites are called as modules (not read around).
    asked: only settings that name it are tried on it.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    at: str | None = None
    whole: bool = False
    calls: bool = True
    asked: bool = False

    def __str__(self) -> str:
        return self.name


def floats(*shape: int, name: str = "x") -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(shape, generator=torch.Generator().manual_seed(7))}


def tokens(vocab: int, length: int, **more: Tensor) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        ids = torch.randint(5, vocab, (3, length), generator=torch.Generator().manual_seed(7))
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0  # right padding, as in training
        return {"input_ids": ids, "attention_mask": mask, **more}

    return make


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=48,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        **NO_DROPOUT,
    )
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=48,
        n_positions=64,
        n_embd=24,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=48,
        d_model=24,
        d_kv=12,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        num_channels=3,
        num_labels=4,
        **NO_DROPOUT,
    )
    return transformers.ViTForImageClassification(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return transformers.MixtralForCausalLM(config)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def packed() -> nn.Module:
    return nn.Sequential(PackedBlock(24, 2), PackedBlock(24, 2), nn.Linear(24, 5))


SITE = r"/^site$/"
DECODER = {"decoder_input_ids": torch.tensor([[0, 9, 4, 7], [0, 3, 3, 8], [0, 11, 40, 2]])}

HOSTS = [
    Host("linear_square", lambda: Net(nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 5)), floats(3, 6, 12), SITE),
    Host(
        "linear_wide",
        lambda: Net(nn.Linear(12, 20), nn.Linear(20, 28, bias=False), nn.Linear(28, 5)),
        floats(3, 6, 12),
        SITE,
    ),
    Host(
        "linear_read",
        lambda: Reader(nn.Linear(12, 20), nn.Linear(20, 28), nn.Linear(28, 5)),
        floats(3, 6, 12),
        SITE,
        calls=False,
    ),
    Host("conv1d", lambda: Net(nn.Linear(12, 20), Conv1D(28, 20), nn.Linear(28, 5)), floats(3, 6, 12), SITE),
    Host(
        "conv2d",
        lambda: Net(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2), nn.Conv2d(12, 4, 1)),
        floats(3, 3, 7, 9),
        SITE,
    ),
    Host(
        "conv2d_reflect",
        lambda: Net(
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 12, (3, 2), padding=2, dilation=2, padding_mode="reflect"),
            nn.Conv2d(12, 4, 1),
        ),
        floats(3, 3, 7, 9),
        SITE,
    ),
    Host(
        "embedding",
        lambda: Net(nn.Identity(), nn.Embedding(48, 20), nn.Linear(20, 5)),
        lambda: {"x": torch.arange(18).view(3, 6)},
        SITE,
    ),
    Host("packed_qkv", packed, floats(3, 6, 24, name="input"), "q, v", whole=True),
    Host("multihead", lambda: SelfAttention(24, 2), floats(3, 6, 24), "q, v"),
    Host("multihead_whole", lambda: SelfAttention(24, 2), floats(3, 6, 24), "linear"),
    Host("experts", mixtral, tokens(48, 7), "expert.gate_up, expert.down", whole=True),
    Host("encoder", encoder, floats(3, 6, 24, name="src"), whole=True),
    Host("bert", bert, tokens(48, 7), whole=True),
    Host("llama", llama, tokens(48, 7), whole=True),
    Host("t5", t5, tokens(48, 7, **DECODER), whole=True),
    Host("gpt2", gpt2, tokens(48, 7), whole=True),
    Host("convnet", ConvNet, floats(3, 3, 7, 8), asked=True),
    Host("vit", vit, floats(3, 3, 8, 8, name="pixel_values"), whole=True),
]
BY_NAME = {host.name: host for host in HOSTS}


@functools.cache
def _template(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = BY_NAME[name].make()
        with torch.no_grad():
            for p in model.parameters():
                # no zero biases, no unit norms: a mistake in either must show
                p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def fresh(host: Host) -> nn.Module:
    """The host's model, a new copy each time."""
    return copy.deepcopy(_template(host.name))


def forward(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's main output."""
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out[0]


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The same without a graph: torch picks its kernels by whether gradients are wanted, and bits are compared here."""
    with torch.no_grad():
        return forward(model, inputs)
