"""Does every method learn? 2,000 sentences of SST-2 on MiniLM, one pass, tested on all 1,821; each method at its default settings.

    python benchmarks/learning.py --work runs/learning                      # all that are registered, three seeds; goes on where it stopped
    python benchmarks/learning.py --work runs/learning lora dora "ia3 + bitfit"   # these
    python benchmarks/learning.py --work runs/learning --write docs/learning.md   # the table of what is there

Each run is `graftwork train` in a process of its own. The linear probe (a head on the frozen model) has the best of three learning rates.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

import graftwork as gw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from minilm import folder as backbone

ROWS, SEEDS, POINTS = 2000, (0, 1, 2), 2.0  # POINTS: of accuracy above the linear probe
PROBE = {f"full(at='head'), lr {lr}": ("full(at='head')", lr) for lr in (5e-4, 2e-3, 1e-2)}
NOT_ALONE = {"full", "invertible", "generated", "mixture", "sparse", "gated"}  # a head alone, or needs another method


def rows_of(work: Path) -> tuple[Path, Path]:
    """The fixed training rows, written once, and the test rows."""
    data = Path(os.environ.get("GRAFTWORK_DATA", "../shared/data")) / "sst2"
    chosen = work / f"train-{ROWS}.tsv"
    if not chosen.exists():
        with (data / "train.tsv").open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        random.Random(0).shuffle(rows)
        chosen.write_text("\n".join("\t".join(row) for row in (header, *rows[:ROWS])) + "\n", encoding="utf-8")
    return chosen, data / "test.tsv"


def run(work: Path, name: str, method: str, lr: float | None, seed: int) -> dict[str, Any]:
    """One training in a process of its own, and what it cost."""
    train, test = rows_of(work)
    out = work / "adapter"
    command = [str(Path(sys.executable).parent / "graftwork"), "train", "--backbone", backbone(), "--data", str(train)]
    command += ["--eval-data", str(test), "--method", method, "--out", str(out), "--overwrite", "--epochs", "1"]
    command += ["--seed", str(seed), *([] if lr is None else ["--lr", str(lr)])]
    with (work / "log.txt").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
    if status:
        return {"name": name, "seed": seed, "failed": (work / "log.txt").read_text()[-600:]}
    said = json.loads((out / "adapter.json").read_text())["metadata"]
    count = sum(p.num_parameters for p in _loaded(out))
    return {
        "name": name,
        "seed": seed,
        "accuracy": said["metrics"]["accuracy"],
        "parameters": count,
        "seconds": said["training"]["seconds"],
        "memory": used.ru_maxrss / 1024,
        "bytes": (out / "adapter.safetensors").stat().st_size,
    }


def _loaded(out: Path) -> Sequence[Any]:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(backbone(), num_labels=2)
    return gw.load(model, out).parts


def table(done: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of the page, best first."""
    names = list(dict.fromkeys(r["name"] for r in done))
    each = {n: [r for r in done if r["name"] == n and "accuracy" in r] for n in names}
    mean = {n: statistics.mean(r["accuracy"] for r in of) for n, of in each.items() if of}
    probe = max((mean[n] for n in PROBE if n in mean), default=float("nan"))
    out = [
        "| method | accuracy | each seed | above the probe | trained | s | MB | file, kB |",
        "| --- | " + "---: | " * 7,
    ]
    for n in sorted(mean, key=lambda n: -mean[n]):
        of, gain = each[n], 100 * (mean[n] - probe)
        short = "" if n in PROBE or gain != gain else f"{gain:+.1f}{'' if gain >= POINTS else ' (short)'}"
        spread = " ".join(f"{r['accuracy']:.3f}" for r in of)
        cost = [statistics.median(r[k] for r in of) for k in ("parameters", "seconds", "memory", "bytes")]
        numbers = f"{cost[0]:,.0f} | {cost[1]:.0f} | {cost[2]:,.0f} | {cost[3] / 1e3:,.0f}"
        out.append(f"| `{n}` | {mean[n]:.3f} | {spread} | {short} | {numbers} |")
    return out + [f"| `{n}` | failed | {of[0]['failed'].splitlines()[-1][:80]} | | | | | |" for n in names if n not in mean
                  for of in [[r for r in done if r["name"] == n]]]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="methods as text; by default all that are registered")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the results, which a later call goes on with"
    )
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds (default: 3)")
    parser.add_argument("--write", type=Path, help="write the table of what is there to this file, and stop")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    log = asked.work / "results.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = [r for r in done if "accuracy" in r]  # what failed is tried again
    if asked.write:
        text = asked.write.read_text() if asked.write.exists() else ""
        head, _, rest = text.partition("<!-- table -->\n")
        asked.write.write_text(
            head
            + "<!-- table -->\n"
            + "\n".join(table(done))
            + "\n<!-- /table -->"
            + rest.partition("<!-- /table -->")[2]
        )
        return
    known = [n for n in gw.methods() if n not in NOT_ALONE and not getattr(gw.system(n), "mixes", False)]
    wanted = {n: (n, None) for n in asked.methods or known} | ({} if asked.methods else PROBE)
    have = {(r["name"], r["seed"]) for r in done}
    jobs = [(n, *job, s) for n, job in wanted.items() for s in SEEDS[: asked.seeds] if (n, s) not in have]
    for name, method, lr, seed in track(jobs, description="training"):
        with log.open("a") as file:
            file.write(json.dumps(run(asked.work, name, method, lr, seed)) + "\n")
    print("\n".join(table([json.loads(line) for line in log.read_text().splitlines()])))


if __name__ == "__main__":
    main()
