"""Mixed batches: the forward pass of a batch whose rows have adapters of their own, against the bare backbone's.

A BERT-like model (6 x 384, mlp 1536), 64 rows x 32 tokens, with 1, 8, 32 and 64 distinct adapters, drawn at random for the rows; and
HF PEFT's `adapter_names` on the same model. With --decode: a Llama-like model (8 x 512) makes one more token for each row behind a
cache of 128, without the peer. Calls are interleaved in one process; the ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from inference import token_of
from measure import bert_like, interleaved, llama_like, ratio, steady_allocator
from torch import nn

import graftwork as gw

LINEAR = "q, k, v, o, gate, up, down | q, k, v, o, up, down"
KINDS: dict[str, tuple[float, Callable[[int], Any]]] = {  # name -> target, method of adapter i
    "lora": (1.28, lambda i: gw.LoRA(r=8, at=LINEAR)),
    "ia3": (1.08, lambda i: gw.IA3()),
    "bitfit": (1.08, lambda i: gw.BitFit()),
    "bottleneck": (1.35, lambda i: gw.Bottleneck(reduction=16, at="attn, mlp")),
    "ranks": (1.6, lambda i: gw.LoRA(r=(4, 8, 16, 32)[i % 4], at=LINEAR)),
    "methods": (1.6, lambda i: [gw.LoRA(r=8, at=LINEAR), gw.IA3(), gw.BitFit(), gw.Bottleneck(reduction=16)][i % 4]),
}


def assignment(rows: int, distinct: int) -> list[int]:
    """Which adapter each row has: every one at least once, in a random order."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(distinct)).tolist()
    return [i % distinct for i in order]


def grafted(model: nn.Module, kind: str, distinct: int) -> nn.Module:
    model = copy.deepcopy(model)
    for i in range(distinct):
        adapter = gw.graft(model, KINDS[kind][1](i), f"a{i}", head=False, seed=i)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p) * 0.02)
    return model


def peft(model: nn.Module, distinct: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    def config() -> Any:
        names = ["query", "key", "value", "dense"]
        return LoraConfig(
            r=8, lora_alpha=16, target_modules=names, exclude_modules=["pooler.dense"], init_lora_weights=False
        )

    wrapped = get_peft_model(copy.deepcopy(model), config(), adapter_name="a0")
    for i in range(1, distinct):
        wrapped.add_adapter(f"a{i}", config())
    return wrapped.eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="which adapters")
    parser.add_argument("--distinct", nargs="+", type=int, default=[1, 8, 32, 64], help="numbers of distinct adapters")
    parser.add_argument("--rows", type=int, default=64, help="rows of the batch")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sorted", action="store_true", help="rows with the same adapter stand side by side")
    parser.add_argument("--decode", action="store_true", help="one token for each row behind a cache")
    parser.add_argument("--no-peft", action="store_true", help="leave HF PEFT out")
    args = parser.parse_args(argv)
    steady_allocator()
    base = (llama_like() if args.decode else bert_like()).eval().requires_grad_(False).to(args.device)
    ids = torch.randint(5, 8000, (args.rows, args.tokens), generator=torch.Generator().manual_seed(0)).to(args.device)
    print(f"{'adapters':<12} {'distinct':>8} {'library':<10} {'bare ms':>9} {'ms':>9} {'target':>7} {'ratio':>7}")
    for kind in args.kinds:
        for distinct in args.distinct:
            places = sorted(assignment(args.rows, distinct)) if args.sorted else assignment(args.rows, distinct)
            names = [f"a{i}" for i in places]
            model = grafted(base, kind, distinct)
            gw.activate(model, gw.rows(names))
            calls: dict[str, Callable[[], object]] = {
                "bare": token_of(base, args.rows) if args.decode else lambda: base(ids),
                "graftwork": token_of(model, args.rows) if args.decode else lambda model=model: model(ids),
            }
            if kind == "lora" and not args.no_peft and not args.decode:
                other = peft(base, distinct)
                calls["HF PEFT"] = lambda other=other, names=names: other(input_ids=ids, adapter_names=names)
            with torch.no_grad():
                seconds = interleaved(calls, args.rounds)
            for library in list(calls)[1:]:
                ms = [sorted(seconds[n])[args.rounds // 2] * 1e3 for n in ("bare", library)]
                target = KINDS[kind][0] if library == "graftwork" else float("nan")
                print(
                    f"{kind:<12} {distinct:>8} {library:<10} {ms[0]:>9.1f} {ms[1]:>9.1f} {target:>7.2f} "
                    f"{ratio(seconds[library], seconds['bare']):>7.3f}",
                    flush=True,
                )
            model = other = None
            calls.clear()
            gc.collect()


if __name__ == "__main__":
    main()
