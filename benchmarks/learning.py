"""Does every method learn? 2,000 sentences of SST-2 on MiniLM, one pass, tested on all 1,821; each method at its default settings.

    python benchmarks/learning.py                       # all that are registered, three seeds; goes on where docs/learning.jsonl stops
    python benchmarks/learning.py lora "prefix @ 0.02"  # these; after an @ another value of the method's `lr`, to find a default
    python benchmarks/learning.py --whole               # the five most used, on all 6,920 training sentences
    python benchmarks/learning.py --write               # the tables of docs/learning.md from what docs/learning.jsonl holds

Each run is graftwork's own `train`, in a process of its own on one thread, in bfloat16; then the adapter's file is loaded again and tested.
Learning rates are chosen on the 872 sentences of the dev split, never on the test. The linear probe (a head on the frozen model) has the
best of several learning rates.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import track

import graftwork as gw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from minilm import folder as backbone

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, LOG = DOCS / "learning.md", DOCS / "learning.jsonl"
ROWS, SEEDS, POINTS = 2000, 3, 2.0  # POINTS: of accuracy above the linear probe
PROBE = [("full(at='head')", lr) for lr in (0.01, 0.03, 0.1)]
MOST_USED = ("lora", "dora", "ia3", "prefix_tuning", "bottleneck")
NOT_ALONE = {"full", "invertible", "generated", "mixture", "sparse", "gated", "adapter_drop"}  # need another method


def sst2() -> Path:
    return Path(os.environ.get("GRAFTWORK_DATA", "../shared/data")) / "sst2"


def training_rows(work: Path, whole: bool) -> str:
    """All training rows, or the fixed draw that is the same for all runs."""
    if whole:
        return str(sst2() / "train.tsv")
    with (sst2() / "train.tsv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    random.Random(0).shuffle(rows)
    chosen = work / "train.tsv"
    chosen.write_text("\n".join("\t".join(row) for row in (header, *rows[:ROWS])) + "\n", encoding="utf-8")
    return str(chosen)


def job(text: str) -> tuple[str, float]:
    """A method, and the learning rate: what stands after the @, or its own."""
    name, _, lr = text.partition(" @ ")
    return name, float(lr) if lr else gw.parse_methods(name)[0].lr


def run(name: str, lr: float, seed: int, whole: bool) -> dict[str, Any]:
    """One training, what it reached and what it cost."""
    from graftwork.train import DataSettings, FitSettings, TrainSettings, train
    from graftwork.train.run import chosen_split
    from graftwork.train.trained import open_trained

    first = gw.parse_methods(name)[0]
    if lr != first.lr:  # others of a list, and the head, keep theirs
        type(first).lr = lr
    start, made = time.process_time(), {"name": name, "lr": lr, "seed": seed} | ({"whole": True} if whole else {})
    with tempfile.TemporaryDirectory() as work:
        settings = TrainSettings(
            backbone=backbone(),
            out=f"{work}/adapter",
            method=name,
            data=DataSettings(data=training_rows(Path(work), whole), eval_data=str(sst2() / "dev.tsv")),
            fit=FitSettings(
                epochs=1,
                seed=seed,
                precision="bf16",
                trainer=("train_sampling_strategy=group_by_length",),
            ),
        )
        try:
            found = train(settings)
        except (gw.GraftError, RuntimeError) as error:
            return {**made, "failed": " ".join(str(error).split())[:200]}
        cost = {
            "seconds": round(time.process_time() - start, 1),
            "memory": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "bytes": sum(f.stat().st_size for f in found.folder.iterdir() if f.suffix == ".safetensors"),
        }
        tested = open_trained(settings.out).evaluate(chosen_split(str(sst2() / "test.tsv")))
    scores = {"dev": round(found.metrics["accuracy"], 4), "accuracy": round(tested["accuracy"], 4)}
    return {**made, **scores, "parameters": found.parameters, **cost}


def results() -> list[dict[str, Any]]:
    """What has been run, the newest of each method, learning rate, seed and set of training rows."""
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    return list({ran(r): r for r in map(json.loads, lines)}.values())


def ran(run: dict[str, Any]) -> tuple[str, float, int, bool]:
    """What one run is of."""
    return run["name"], run["lr"], run["seed"], run.get("whole", False)


def table(done: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of the page, best first: methods at their own learning rate, the probe at what is best on the dev rows."""
    each: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for r in sorted(done, key=lambda r: r["seed"]):
        each.setdefault((r["name"], r["lr"]), []).append(r)
    good = {key: of for key, of in each.items() if all("accuracy" in r for r in of)}
    mean = {key: statistics.mean(r["accuracy"] for r in of) for key, of in good.items()}
    probe = max((key for key in PROBE if key in mean), key=lambda key: statistics.mean(r["dev"] for r in each[key]))
    shown = [key for key in each if key == probe or (key == job(key[0]) and key[0] != probe[0])]
    out = [
        "| method | lr | accuracy | each seed | above the probe | trained | CPU s | MB | file, kB |",
        "| --- | " + "---: | " * 8,
    ]
    for key in sorted((key for key in shown if key in good), key=lambda key: -mean[key]):
        of, gain = each[key], 100 * (mean[key] - mean[probe])
        short = "" if key == probe else f"{gain:+.1f}{'' if gain >= POINTS else ' (short)'}"
        spread = " ".join(f"{r['accuracy']:.3f}" for r in of)
        cost = [statistics.median(r[k] for r in of) for k in ("parameters", "seconds", "memory", "bytes")]
        numbers = f"{cost[0]:,.0f} | {cost[1]:.0f} | {cost[2]:,.0f} | {cost[3] / 1e3:,.0f}"
        out.append(f"| `{key[0]}` | {key[1]:g} | {mean[key]:.3f} | {spread} | {short} | {numbers} |")
    failed = {key: next(r["failed"] for r in each[key] if "failed" in r) for key in shown if key not in good}
    return out + [f"| `{name}` | | refused: {why} | | | | | | |" for (name, _), why in failed.items()]


def write(done: Sequence[dict[str, Any]]) -> None:
    """Put the tables between the page's marks."""
    text = PAGE.read_text()
    for mark, whole in (("table", False), ("whole", True)):
        head, _, rest = text.partition(f"<!-- {mark} -->\n")
        tail = rest.partition(f"<!-- /{mark} -->")[2]
        of = [r for r in done if ran(r)[3] == whole]
        rows = table(of) if of else ["Not run yet."]
        text = f"{head}<!-- {mark} -->\n" + "\n".join(rows) + f"\n<!-- /{mark} -->{tail}"
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="methods as text; by default all that are registered, and the probe")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many seeds (default: {SEEDS})")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    parser.add_argument(
        "--whole", action="store_true", help="on the whole training set; by default the five most used methods"
    )
    parser.add_argument("--again", action="store_true", help="also what has been run already")
    parser.add_argument("--write", action="store_true", help="write the tables and stop")
    asked = parser.parse_args()
    if not asked.write:
        os.environ["OMP_NUM_THREADS"] = "1"
        alone = [n for n in gw.methods() if n not in NOT_ALONE and not getattr(gw.system(n), "mixes", False)]
        have = set() if asked.again else set(map(ran, results()))
        wanted = [job(text) for text in asked.methods] or [*PROBE, *map(job, MOST_USED if asked.whole else alone)]
        jobs = [(*w, seed, asked.whole) for seed in range(asked.seeds) for w in wanted]
        jobs = [each for each in jobs if each not in have]
        several = multiprocessing.get_context("forkserver")
        several.set_forkserver_preload(["graftwork.train.run", "graftwork.train.trained"])
        with ProcessPoolExecutor(asked.workers, mp_context=several, max_tasks_per_child=1) as pool:
            waiting = [pool.submit(run, *each) for each in jobs]
            for ready in track(as_completed(waiting), total=len(jobs), description="training"):
                with LOG.open("a") as file:
                    file.write(json.dumps(ready.result()) + "\n")
    write(results())


if __name__ == "__main__":
    main()
