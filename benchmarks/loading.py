"""What grafting, loading, switching, removing and saving cost, beside the bare work and beside HF PEFT.

The bare work is measured in the same rounds, and keeps what it makes as long as graftwork does:
allocating and initialising the same tensors; the raw read, which is `safetensors.torch.load_file` from the page cache and
one copy of every tensor, since `load_file` maps the file, and who owns its bytes has at least to read them once (the ratio to
`load_file` alone is printed too); `save_file` and one fsync. Every figure is a median; calls take turns (A B A B).

  graft     LoRA on the 225 linears of a 32-layer Llama shape (hidden 4096), whose weights share one number in memory
  load      LoRA on all linears of a 22.7M-parameter BERT shape: one adapter onto a model that has one, then many
  memory    what the resident set grows by per adapter, beside its bytes
  switch, remove, save    with all of them loaded
  import    `import graftwork` beyond `import torch`, and `graftwork --help`, in processes of their own

HF PEFT gets fewer adapters (--peer-adapters): each of its loads walks all that were loaded before, so that 200 take
minutes. Run: python benchmarks/loading.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import safetensors.torch
import torch
import transformers
from measure import bert_like, interleaved
from torch import Tensor, nn

import graftwork as gw

ROLES = "linear"
PEER_TARGETS = ["query", "key", "value", "dense"]


def row(what: str, ours: float, bare: float | None, peer: float | None, target: str, unit: str = "ms") -> None:
    """One line of the table, the ratio last (the figure itself where the target is one)."""
    cells = [
        f"{ours:10.2f} {unit:<3}",
        " " * 14 if bare is None else f"{bare:10.2f} {unit:<3}",
        " " * 14 if peer is None else f"{peer:10.2f} {unit:<3}",
    ]
    last = f"{ours:.2f}" if bare is None else f"{ours / bare:.2f}"
    print(f"{what:<34}{''.join(cells)} {target:>9} {last:>9}", flush=True)


def ms(seconds: list[float]) -> float:
    return 1000 * median(seconds)


def llama_shape() -> nn.Module:
    """A Llama of 7 billion parameters that all lie on one number per tensor."""
    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(1).expand(p.shape), requires_grad=False)
    return model


def grafting(rounds: int) -> None:
    """LoRA on every linear, the vocabulary's too, against the draws alone."""
    import peft

    model = llama_shape()
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    wrapped = peft.LoraConfig(r=8, target_modules=r".*(proj|lm_head)")

    made: list[tuple[Tensor, Tensor]] = []

    def bare() -> None:
        for wide, out in sizes:
            made.append((nn.init.kaiming_uniform_(torch.empty(8, wide), 5**0.5), torch.zeros(out, 8)))

    def ours() -> None:
        gw.graft(model, gw.LoRA(r=8, at="linear, lm_head"), seed=0)

    seconds = interleaved(
        {
            "bare": bare,
            "bare out": made.clear,
            "ours": ours,
            "ours out": lambda: gw.remove(model, "default"),
            "peer": lambda: peft.inject_adapter_in_model(wrapped, model),
            "peer out": lambda: unwrap(model),
        },
        rounds,
    )
    row(f"graft LoRA, {len(sizes)} linears", *(ms(seconds[k]) for k in ("ours", "bare", "peer")), "2.0")


def unwrap(model: nn.Module) -> None:
    """Put the backbone's linears back in the place of PEFT's."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "base_layer"):
                setattr(parent, name, child.base_layer)


def stored(model: nn.Module, folder: Path, count: int, r: int) -> None:
    """`count` adapters with values of their own, in graftwork's format: folder/a0, folder/a1..."""
    adapter = gw.graft(model, gw.LoRA(r=r, at=ROLES), "a")
    for i in range(count):
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_()
        gw.save(model, "a", folder / f"a{i}")
    gw.remove(model, "a")


def raw(file: Path) -> dict[str, Tensor]:
    """The bytes of a file as tensors of one's own."""
    return {name: t.clone() for name, t in safetensors.torch.load_file(file).items()}


def resident() -> int:
    """Bytes of memory that the process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def loading(count: int, peers: int, r: int, rounds: int) -> None:
    """One adapter, many adapters, and what can be done with them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = bert_like()
        stored(model, folder, count, r)
        file = folder / "a0" / "adapter.safetensors"
        size = file.stat().st_size
        print(f"\n{count} adapters of LoRA r={r} on {ROLES!r}, {size / 1e6:.2f} MB each (PEFT: {peers} adapters)")
        gw.load(model, folder / "a0", "first")

        seconds = interleaved(
            {
                "mapped": lambda: safetensors.torch.load_file(file),
                "bare": lambda: raw(file),
                "ours": lambda: gw.load(model, folder / "a0", "one more"),
                "out": lambda: gw.remove(model, "one more"),
            },
            rounds,
        )
        row("load one, onto a grafted model", ms(seconds["ours"]), ms(seconds["bare"]), None, "3.0")
        row("  beside load_file alone", ms(seconds["ours"]), ms(seconds["mapped"]), None, "")
        gw.remove(model, "first")

        peer, peer_first, peer_last = peer_loading(folder, peers, r)
        kept: list[dict[str, Tensor]] = []
        before, mapped, bare, ours = resident(), [], [], []
        for i in range(count):
            own = folder / f"a{i}" / "adapter.safetensors"
            mapped.append(timed(lambda own=own: safetensors.torch.load_file(own)))  # type: ignore[misc]
            bare.append(timed(lambda own=own: kept.append(raw(own))))  # type: ignore[misc]
            ours.append(timed(lambda i=i: gw.load(model, folder / f"a{i}", f"a{i}")))  # type: ignore[misc]
        grown = (resident() - before) / count - size  # the raw reads are kept too
        row("load all (PEFT: those it loads)", 1e3 * sum(ours), 1e3 * sum(bare), peer, "3.0")
        row("  beside load_file alone", 1e3 * sum(ours), 1e3 * sum(mapped), None, "")
        tenth = max(1, count // 10)
        row("  the last tenth beside the first", ms(ours[-tenth:]), ms(ours[:tenth]), None, "1.2")
        print(f"{'  PEFT, the last beside the first':<34}{peer_last:10.2f} ms {peer_first:10.2f} ms")
        held = sum(t.untyped_storage().nbytes() for t in gw.adapters(model)["a0"].state_dict().values())
        row("tensors of one adapter", held / 1e6, size / 1e6, None, "1.1", "MB")
        row("resident memory per adapter", grown / 1e6, size / 1e6, None, "1.1", "MB")

        names = iter([f"a{i % count}" for i in range(10 * rounds)])
        switched = interleaved({"switch": lambda: gw.activate(model, next(names))}, rounds)["switch"]
        row("switch, ms", ms(switched), None, None, "2.00")
        saving(model, folder, rounds)
        removed = [timed(lambda i=i: gw.remove(model, f"a{i}")) for i in range(count // 2)]  # type: ignore[misc]
        row("remove, ms", ms(removed), None, None, "5.00")


def saving(model: nn.Module, folder: Path, rounds: int) -> None:
    tensors: dict[str, Tensor] = {k.replace("/", "."): t for k, t in gw.adapters(model)["a0"].state_dict().items()}

    def bare() -> None:
        safetensors.torch.save_file(tensors, folder / "raw.safetensors")
        with open(folder / "raw.safetensors", "rb") as file:
            os.fsync(file.fileno())

    seconds = interleaved({"bare": bare, "ours": lambda: gw.save(model, "a0", folder / "saved")}, rounds)
    row("save", ms(seconds["ours"]), ms(seconds["bare"]), None, "2.0")


def peer_loading(folder: Path, count: int, r: int) -> tuple[float, float, float]:
    """PEFT: the milliseconds of all its loads, of the first and of the last."""
    import peft

    model = bert_like()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=PEER_TARGETS), "p")
    wrapped.save_pretrained(folder / "peft", selected_adapters=["p"])
    wrapped = peft.PeftModel.from_pretrained(bert_like(), folder / "peft/p", adapter_name="zero")

    def load(i: int) -> None:
        wrapped.load_adapter(folder / "peft/p", adapter_name=f"p{i}")
        wrapped.set_adapter(f"p{i}")

    seconds = [timed(lambda i=i: load(i)) for i in range(count)]  # type: ignore[misc]
    return 1e3 * sum(seconds), 1e3 * seconds[0], 1e3 * seconds[-1]


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def importing(rounds: int) -> None:
    """In fresh processes: all that is beyond `import torch` is ours, or the peer's."""

    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    names = {
        "torch": run("import torch"),
        "ours": run("import torch, graftwork"),
        "used": run("import torch, graftwork; graftwork.LoRA, graftwork.graft, graftwork.load"),
        "peer": run("import torch, peft"),
        "help": run("from graftwork.cli import main; main(['--help'])"),
    }
    seconds = {name: median(times) for name, times in interleaved(names, rounds, warm=1).items()}
    beyond = max(0.0, seconds["ours"] - seconds["torch"])
    row("import, beyond torch, s", beyond, None, seconds["peer"] - seconds["torch"], "0.30", "s")
    row("  and its first use, s", seconds["used"] - seconds["torch"], None, None, "", "s")
    row("graftwork --help, s", seconds["help"], None, None, "0.50", "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=200, help="how many graftwork loads (default 200)")
    parser.add_argument("--peer-adapters", type=int, default=20, help="how many HF PEFT loads (default 20)")
    parser.add_argument("--r", type=int, default=8, help="rank of the loaded adapters (default 8)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each measurement (default 15)")
    given = parser.parse_args()
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    print(f"{'':<34}{'graftwork':>11}{'bare':>15}{'HF PEFT':>15} {'target':>10} {'ratio':>9}")
    importing(max(3, given.rounds // 3))
    grafting(given.rounds)
    loading(given.adapters, given.peer_adapters, given.r, given.rounds)


if __name__ == "__main__":
    main()
