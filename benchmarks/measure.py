"""What every benchmark shares: interleaved timing, peak allocated bytes, and the two random models."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from statistics import median

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of every call, A B A B: what slows the machine for a while slows all of them."""
    for _ in range(warm):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(of: list[float], to: list[float]) -> float:
    """Median of the ratios within a round: both halves of each saw the same machine."""
    return median(a / b for a, b in zip(of, to, strict=True))


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that the allocator had handed out at one time during the call, beyond what was held before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def llama_like(layers: int = 8, hidden: int = 512, mlp: int = 1408, vocab: int = 8000, heads: int = 8) -> nn.Module:
    """A random Llama, by default the small one that the figures in docs/speed.md are of."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert_like(layers: int = 6, hidden: int = 384) -> nn.Module:
    """A random BERT with a classification head and no dropout (the shape of MiniLM)."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    return BertForSequenceClassification(config)
