"""How long a training step takes, and how much memory, against the frozen bound and against HF PEFT.

The frozen bound is the least that training anything below the first block costs: the same model and batch, every weight
frozen, one trained number added to the embeddings. A step is forward, loss, backward; the optimiser is left out.
graftwork, the peer and the bound take turns in one process; a ratio is the median over rounds.

Run: python benchmarks/training.py [--model llama|bert] [--rounds N] [--only "lora;dora"] [--no-peer]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import bert_like, interleaved, llama_like, peak_bytes, ratio, steady_allocator
from torch import Tensor, nn

import graftwork as gw

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


@dataclass(frozen=True)
class Case:
    """A method here, its twin there (None: the peer has none), and the ratio to reach."""

    method: Any
    peer: Callable[[str], Any] | None
    target: float


def cases(model: str) -> dict[str, Case]:
    """The methods measured. Peers are named as HF PEFT's configurations."""
    import peft

    linears = LLAMA if model == "llama" else BERT
    attention = ["q_proj", "v_proj"] if model == "llama" else ["query", "value"]
    inner = ["k_proj", "v_proj", "down_proj"] if model == "llama" else ["key", "value", "output.dense"]
    down = ["down_proj"] if model == "llama" else ["output.dense"]
    task = "CAUSAL_LM" if model == "llama" else "SEQ_CLS"
    every = "q, k, v, o, gate, up, down" if model == "llama" else "q, k, v, o, up, down"
    return {
        "lora": Case(gw.LoRA(r=8, at=every), lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=linears), 1.10),
        "lora, dropout 0.1": Case(
            gw.LoRA(r=8, dropout=0.1, at=every),
            lambda: peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=linears),
            1.16,
        ),
        "lora on q, v": Case(
            gw.LoRA(r=8, at="q, v"), lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=attention), 1.04
        ),
        "dora": Case(
            gw.DoRA(r=8, at=every),
            lambda: peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=linears),
            1.25,
        ),
        "vera": Case(gw.VeRA(r=256, at=every), lambda: peft.VeraConfig(r=256, target_modules=linears), 1.30),
        "ia3": Case(gw.IA3(), lambda: peft.IA3Config(target_modules=inner, feedforward_modules=down), 1.04),
        "bitfit": Case(gw.BitFit(at="linear", add_missing=True), None, 1.04),
        "loreft": Case(gw.LoReFT(r=4), None, 1.04),
        "prefix": Case(
            gw.Prefix(length=10), lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=10), 1.04
        ),
        "bottleneck": Case(gw.Houlsby(d=32 if model == "llama" else 24), None, 1.08),
        "lst": Case(gw.Ladder(), None, 0.75),
    }


def step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Forward, loss, backward."""

    def call() -> None:
        model(**batch).loss.backward()
        for p in model.parameters():
            p.grad = None

    return call


def bound(model: nn.Module) -> nn.Module:
    """Everything frozen; one trained number on the output of the embedding."""
    model.requires_grad_(False)
    table = model.get_input_embeddings()
    table.register_parameter("one", nn.Parameter(torch.zeros(())))
    table.register_forward_hook(lambda module, args, out: out + module.one)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=["llama", "bert"], default="llama", help="8 x 512 or 6 x 384 (default: llama)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are measured (default: 15)")
    parser.add_argument("--only", default="", help="names of cases, joined by ; (default: all)")
    parser.add_argument("--no-peer", action="store_true", help="measure graftwork alone")
    given = parser.parse_args()
    steady_allocator()
    make = llama_like if given.model == "llama" else bert_like
    rows, seq = (8, 128) if given.model == "llama" else (32, 64)
    torch.manual_seed(1)
    ids = torch.randint(0, 8000, (rows, seq))
    batch = {"input_ids": ids, "labels": ids if given.model == "llama" else torch.randint(0, 2, (rows,))}
    frozen = step(bound(make()), batch)
    wanted = [name.strip() for name in given.only.split(";") if name.strip()]
    print(f"{given.model}, batch {rows} x {seq}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':20} {'bound ms':>9} {'peer':>6} {'MB':>6} {'ours MB':>8} {'ratio':>6}  target")
    for name, case in cases(given.model).items():
        if wanted and name not in wanted:
            continue
        ours = make()
        gw.graft(ours, case.method, head=False)
        calls = {"bound": frozen, "ours": step(ours.train(), batch)}
        if case.peer is not None and not given.no_peer:
            import peft

            calls["peer"] = step(peft.get_peft_model(make(), case.peer()).train(), batch)
        seconds = interleaved(calls, given.rounds)
        mb = {key: peak_bytes(call) / 1e6 for key, call in calls.items()}
        peer = f"{ratio(seconds['peer'], seconds['bound']):6.2f} {mb['peer']:6.0f}" if "peer" in calls else f"{'':13}"
        bound_ms = 1e3 * sorted(seconds["bound"])[given.rounds // 2]
        ours_ratio = ratio(seconds["ours"], seconds["bound"])
        print(f"{name:20} {bound_ms:9.0f} {peer} {mb['ours']:8.0f} {ours_ratio:6.3f}  {case.target}", flush=True)


if __name__ == "__main__":
    main()
