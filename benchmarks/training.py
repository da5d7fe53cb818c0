"""How long a training step takes, and how much memory, against the frozen bound and against HF PEFT.

The frozen bound is the least that training anything below the first block costs: the same model and batch, every weight
frozen, one trained number added to the embeddings. A step is forward, loss, backward; the optimiser is left out.
graftwork, the peer and the bound take turns in one process; a ratio is the median over rounds.

Run: python benchmarks/training.py [--model llama|bert] [--rounds N] [--only "lora;dora"] [--method "ether(blocks=4)"] [--no-peer]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from cases import Case, cases
from measure import bert_like, interleaved, llama_like, peak_bytes, ratio, steady_allocator
from torch import Tensor, nn

import graftwork as gw


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
    parser.add_argument(
        "--method", action="append", default=[], help="any method as text, in the place of the cases; may be repeated"
    )
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
    print(f"{'':24} {'bound ms':>9} {'peer':>6} {'MB':>6} {'ours MB':>8} {'ratio':>6}  target")
    chosen = {text: Case(text, None, 1.35) for text in given.method} or cases(given.model)
    for name, case in chosen.items():
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
        print(f"{name:24} {bound_ms:9.0f} {peer} {mb['ours']:8.0f} {ours_ratio:6.3f}  {case.target}", flush=True)


if __name__ == "__main__":
    main()
