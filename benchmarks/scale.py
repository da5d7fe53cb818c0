"""How cost grows: with the adapters that are loaded but inactive (it should not), with the active ones, with the sites.

A training step is a forward and a backward pass of one batch through a BERT shape with LoRA on all linears. Calls take
turns (A B A B); every figure is a median. HF PEFT is measured with --peer-adapters inactive ones, since loading 500
takes it many minutes. Run: python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from measure import bert_like, interleaved, llama_like
from torch import nn

import graftwork as gw


def step(model: nn.Module) -> Callable[[], None]:
    ids = torch.arange(4 * 64).view(4, 64)

    def run() -> None:
        model(input_ids=ids).logits.square().mean().backward()

    return run


def ours(count: int, chain: int = 1) -> nn.Module:
    """A model with `count` adapters, of which the last `chain` are active."""
    model = bert_like(layers=3)
    for i in range(count):
        gw.graft(model, gw.LoRA(r=8, at="linear"), f"a{i}", seed=i)
    gw.activate(model, " >> ".join(f"a{i}" for i in range(count - chain, count)))
    return model


def peer(count: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=8, target_modules=["query", "key", "value", "dense"])
    model = peft.get_peft_model(bert_like(layers=3), config, "a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    return model.base_model.model  # type: ignore[no-any-return]


def row(what: str, small: float, large: float, target: str) -> None:
    print(f"{what:<52}{1e3 * small:10.2f} ms{1e3 * large:10.2f} ms {target:>9} {large / small:9.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=500, help="inactive adapters of graftwork (default 500)")
    parser.add_argument("--peer-adapters", type=int, default=20, help="inactive adapters of HF PEFT (default 20)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each measurement (default 15)")
    given = parser.parse_args()
    torch.manual_seed(0)
    models = {"one": ours(1), "many": ours(given.adapters), "two": ours(2, 2), "four": ours(4, 4)}
    models |= {"peer one": peer(1), "peer many": peer(given.peer_adapters)}
    times = interleaved({name: step(model) for name, model in models.items()}, given.rounds)
    seconds = {name: median(values) for name, values in times.items()}
    print(f"{'':<52}{'small':>13}{'large':>13} {'target':>9} {'ratio':>9}")
    row(f"a step with 1 and with {given.adapters} loaded", seconds["one"], seconds["many"], "1.02")
    row(f"  PEFT, 1 and {given.peer_adapters}", seconds["peer one"], seconds["peer many"], "")
    added = (seconds["two"] - seconds["one"], (seconds["four"] - seconds["one"]) / 3)
    row("what an active adapter adds: the 2nd, and each of 3", *added, "1 (flat)")
    grafts: dict[str, Callable[[], object]] = {}
    for layers in (16, 32):
        llama = llama_like(layers=layers, hidden=64, mlp=176, vocab=100, heads=4)
        grafts[f"{layers}"] = lambda m=llama: (gw.graft(m, gw.LoRA(at="linear")), gw.remove(m, "default"))  # type: ignore[misc]
    seconds = {name: median(values) for name, values in interleaved(grafts, given.rounds).items()}
    row("graft and remove on 112 and on 224 sites", seconds["16"], seconds["32"], "2.0")


if __name__ == "__main__":
    main()
