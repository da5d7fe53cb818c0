"""What the benchmarks share: interleaved timing and models of the usual shapes, with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable

import transformers
from torch import nn


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds per call of each, measured in turn (A B A B), so that a slow moment of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warm + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def llama_like(layers: int = 8, hidden: int = 512, mlp: int = 1408, vocab: int = 8000, heads: int = 8) -> nn.Module:
    """A Llama with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return transformers.LlamaForCausalLM(config).eval()


def bert_like(layers: int = 6, hidden: int = 384) -> nn.Module:
    """A BERT of the shape of MiniLM with random weights: 22.7M parameters by default."""
    config = transformers.BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden,
    )
    return transformers.BertModel(config).eval()
