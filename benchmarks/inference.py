"""How long a forward pass takes with an unmerged adapter, against the bare backbone and against HF PEFT.

Two shapes: a batch of 8 x 128 tokens, and one token behind a cache of 128 (decoding). graftwork, the peer and the bare
backbone take turns in one process; a ratio is the median over rounds. `deactivated` and `merged` must be 1: they run the
backbone's own code.

Run: python benchmarks/inference.py [--rounds N] [--only "lora;dora"] [--no-peer]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import interleaved, llama_like, ratio, steady_allocator
from torch import nn
from training import cases

import graftwork as gw

TARGETS = {"lora": (1.10, 1.20)}  # at 8 x 128, at one token; all others (1.10, 1.10)
WEIGHTS = ["lora", "lora on q, v", "dora", "vera", "ia3"]


def batch_of(model: nn.Module) -> Callable[[], None]:
    """A forward pass over 8 x 128 tokens."""
    ids = torch.randint(0, 8000, (8, 128), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def call() -> None:
        model(input_ids=ids, use_cache=False)

    return call


def token_of(model: nn.Module, rows: int = 1) -> Callable[[], None]:
    """One more token of each row behind 128 in the cache; the cache is cut back afterwards."""
    ids = torch.randint(0, 8000, (rows, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def call() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="rounds at 8 x 128; ten times as many at one token")
    parser.add_argument("--only", default="", help="names of cases, joined by ; (default: all)")
    parser.add_argument("--no-peer", action="store_true", help="measure graftwork alone")
    given = parser.parse_args()
    steady_allocator()
    wanted = [name.strip() for name in given.only.split(";") if name.strip()] or [*WEIGHTS, "deactivated", "merged"]
    known = cases("llama")
    print(f"llama 8 x 512, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{'':16} {'bare ms':>8} {'peer':>6} {'8 x 128':>8}  target | {'bare ms':>8} {'peer':>6} {'1 token':>8}  target"
    )
    for name in wanted:
        case = known.get(name, known["lora"])
        models = {"bare": llama_like().eval().requires_grad_(False), "ours": llama_like().eval()}
        gw.graft(models["ours"], case.method, head=False)
        if name == "deactivated":
            gw.activate(models["ours"], None)
        elif name == "merged":
            gw.merge(models["ours"])
        elif case.peer is not None and not given.no_peer:
            import peft

            models["peer"] = peft.get_peft_model(llama_like(), case.peer()).eval()
        cells = []
        targets = (1.0, 1.0) if name in ("deactivated", "merged") else TARGETS.get(name, (1.10, 1.10))
        for kind, rounds, target in ((batch_of, given.rounds, targets[0]), (token_of, 10 * given.rounds, targets[1])):
            seconds = interleaved({key: kind(model) for key, model in models.items()}, rounds)
            peer = f"{ratio(seconds['peer'], seconds['bare']):6.2f}" if "peer" in models else " " * 6
            bare = 1e3 * sorted(seconds["bare"])[rounds // 2]
            cells.append(f"{bare:8.2f} {peer} {ratio(seconds['ours'], seconds['bare']):8.3f}  {target:6}")
        print(f"{name:16} {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
