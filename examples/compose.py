"""Adapters as values, on real input: several in one pass, arithmetic between them, and what others have learned, fused for a third task.

MiniLM, SST-2 (is a sentence of a review positive?) and Subj (is a sentence an opinion or a plot?) from the folder GRAFTWORK_DATA.
Every number printed is measured in the run. Writes figures.json and two pictures into --out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compose_report import CURVES, Figures, pictures, tables
from minilm import Rows, accuracy, classifier, fit
from torch import nn

import graftwork as gw

DATA = Path(os.environ.get("GRAFTWORK_DATA", "../shared/data"))
START = time.perf_counter()
RATE, HEAD_RATE = 2e-3, 3e-2
LORA = gw.LoRA(r=8, at="q, k, v, o, up, down")
BOTTLENECK = gw.Bottleneck(d=64, act="relu", norm="before", init="lora", at="block")  # Pfeiffer's
LOWER, UPPER = "0-2", "3-5"  # the layers of MiniLM


@dataclass(frozen=True)
class Size:
    """How much is trained and tested.

    train: rows of SST-2 and as many of Subj to learn from;  few: rows of the third task, for so many epochs and seeds;  test: rows to
    test on;  factors: c of c a + (1 - c) b.
    """

    train: int = 2400
    few: int = 120
    epochs: int = 8
    seeds: int = 3
    test: int = 800
    factors: tuple[float, ...] = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


QUICK = Size(train=32, few=16, epochs=1, seeds=2, test=32, factors=(0.0, 0.5, 1.0))


@dataclass(frozen=True)
class Task:
    """A task: its classes, rows to learn from, rows to test on."""

    classes: tuple[str, ...]
    train: Rows
    test: Rows


def say(text: str) -> None:
    print(f"{time.perf_counter() - START:5.0f} s  {text}", flush=True)


def sentences(folder: str, split: str) -> list[tuple[str, str]]:
    """(text, class) of a split that is there."""
    from graftwork.train.data import read

    rows = read(str(DATA / folder))[split]
    return list(zip(rows["text"], rows["label"], strict=True))


def tasks(size: Size) -> dict[str, Task]:
    """The two tasks with much data, and a third with little.

    reviews: praise, complaint (SST-2's development and test rows) or plot (objective rows of Subj's test file): what the two tasks know
        together, on rows that neither was trained on: a quarter of SST-2's sentences stand in Subj's training file, and are left out.
    """
    out = {}
    for name, classes in (("sst2", ("negative", "positive")), ("subj", ("objective", "subjective"))):
        train, test = (shuffled(sentences(name, split)) for split in ("train", "test"))
        out[name] = Task(classes, Rows.of(train[: size.train], classes), Rows.of(test[: size.test], classes))
    says = {"negative": "complaint", "positive": "praise"}
    seen = {letters(text) for text, _ in sentences("subj", "train")}
    opinions = [
        [(text, says[name]) for text, name in sentences("sst2", split) if letters(text) not in seen]
        for split in ("eval", "test")
    ]
    plots = [(text, "plot") for text, name in sentences("subj", "test") if name == "objective"]
    classes = ("complaint", "praise", "plot")
    train, test = (shuffled(some + more) for some, more in zip(opinions, (plots[:330], plots[330:]), strict=True))
    out["reviews"] = Task(classes, Rows.of(train, classes), Rows.of(test[: size.test], classes))
    return out


def letters(text: str) -> str:
    """A sentence without what tokenisers differ in."""
    return "".join(c for c in text.lower() if c.isalnum())


def shuffled(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return random.Random(0).sample(pairs, len(pairs))


def learn(model: nn.Module, name: str, methods: gw.Method, rows: Rows, seed: int = 0) -> None:
    """A new adapter with a head of its own, one pass over the rows; what comes later leaves it as it is. seed: of its start."""
    adapter = gw.graft(model, methods, name, seed=seed)
    start = time.perf_counter()
    fit(model, rows, epochs=1, lr=RATE, seed=0)
    adapter.trainable = False
    say(
        f"{name}: {methods}, {adapter.num_parameters:,} parameters, {len(rows):,} rows, {time.perf_counter() - start:.0f} s"
    )


# ---------------------------------------------------------------------------------------------- several at once


def at_once(model: nn.Module, given: dict[str, Task]) -> list[Figures]:
    """`a | b` against a pass for each: the same bits, the accuracies, the time."""
    for name in ("sst2", "subj"):
        learn(model, name, BOTTLENECK, given[name].train)
        learn(model, f"{name}.upper", replace(BOTTLENECK, layers=UPPER), given[name].train)
    pairs = {
        "in all layers": ("sst2", "subj"),
        "in all layers, the lower half left out": [str(gw.drop(name, LOWER)) for name in ("sst2", "subj")],
        "trained in the upper half": ("sst2.upper", "subj.upper"),
    }
    out = []
    for what, (a, b) in pairs.items():
        found = {"adapters": what, "expression": f"{a} | {b}", **beside(model, a, b, given)}
        say(
            f"{a} | {b}: {found['ratio']:.2f} of the time of two passes, bits {'equal' if found['equal'] else 'DIFFER'}"
        )
        out.append(found)
    return out


@torch.inference_mode()
def beside(model: nn.Module, a: str, b: str, given: dict[str, Task]) -> Figures:
    """One pass for both and a pass for each, in turns on the same batches of 32.

    equal: whether all outputs of the one are to the bit those of the others;  sst2, subj: accuracy of each branch on its task;
    ms both, ms each: median time of one pass for both, of two passes together;  ratio: median over the batches.
    """
    out: Figures = {"equal": True}
    spent: dict[str, list[float]] = {"both": [], "each": []}
    ways = {"both": [f"{a} | {b}"], "each": [a, b]}
    for task, mine in (("sst2", a), ("subj", b)):
        hits = 0
        for i, (inputs, labels) in enumerate(given[task].test.batches(32)):
            outputs: dict[str, Any] = {}
            for way in sorted(ways, reverse=bool(i % 2)):
                seconds = 0.0
                for expression in ways[way]:
                    gw.activate(model, expression)
                    start = time.perf_counter()
                    outputs[expression] = model(**inputs)
                    seconds += time.perf_counter() - start
                spent[way].append(seconds)
            both = outputs[f"{a} | {b}"]
            out["equal"] &= all(torch.equal(both[name].logits, outputs[name].logits) for name in (a, b))
            hits += int((both[mine].logits.argmax(-1) == labels).sum())
        out[task] = hits / len(given[task].test)
    out |= {f"ms {way}": 1e3 * statistics.median(seconds) for way, seconds in spent.items()}
    out["ratio"] = statistics.median(one / two for one, two in zip(spent["both"], spent["each"], strict=True))
    return out


# ---------------------------------------------------------------------------------------------------- arithmetic


def arithmetic(model: nn.Module, task: Task, size: Size) -> Figures:
    """Adapters of two halves of SST-2, put together in every way there is, against one of all rows."""
    learn(model, "all", LORA, task.train)
    learn(model, "one", LORA, task.train.part(0, 2))
    learn(model, "two", LORA, task.train.part(1, 2))
    learn(model, "apart", LORA, task.train.part(1, 2), seed=1)  # the second half again, from other initial values
    half = {"one": 0.5, "two": 0.5}
    gw.average(model, "soup", ["one", "two"])
    gw.average(model, "soup.apart", ["one", "apart"])
    errors = {
        how: gw.combine(model, how, half, how, r=None if how == "cat" else 8).error for how in ("cat", "svd", "ties")
    }
    say(f"combined: largest error {', '.join(f'{how} {error:.3f}' for how, error in errors.items())}")
    ways = {
        "all": "trained on all rows",
        "one": "trained on the first half",
        "two": "trained on the second half",
        "0.5*one + 0.5*two": "effects, at run time",
        "cat": "the same as one LoRA of rank 16 (`combine`)",
        "svd": "the same, cut at rank 8 (`combine`, svd)",
        "ties": "TIES, rank 8 (`combine`, ties)",
        "soup": "mean of the parameters (`average`)",
        "0.5*one + 0.5*apart": "effects, other initial values",
        "soup.apart": "mean of the parameters, other initial values",
    }
    found = []
    for expression, what in ways.items():
        score = accuracy(model, task.test, expression)
        say(f"{expression}: {score:.3f}")
        found.append({"expression": expression, "what": what, "accuracy": score})
    curves: dict[str, list[float]] = {curve: [] for curve in CURVES}
    for c in size.factors:
        gw.activate(model, c * gw.A("one") + (1 - c) * gw.A("two"))
        curves["effects"].append(accuracy(model, task.test))
        for curve, other in (("parameters", "two"), ("parameters apart", "apart")):
            gw.arithmetic(model, "mixed", {"one": c, other: 1 - c})
            curves[curve].append(accuracy(model, task.test))
            gw.remove(model, "mixed")
        say(f"c = {c:g}: " + ", ".join(f"{curve} {scores[-1]:.3f}" for curve, scores in curves.items()))
    return {"ways": found, "errors": errors, "factors": list(size.factors), "curves": curves}


# -------------------------------------------------------------------------------------------------------- fusion


def third(model: nn.Module, task: Task, size: Size) -> Figures:
    """Few rows of a third task: what the two adapters know, fused for it, against a new adapter and a head alone.

    Every way has a new head of its own. Rates were tried by hand. Mean and standard deviation of the accuracy over seeds, which draw the
    rows and the start.
    """
    ways: dict[str, tuple[list[gw.Method], str, float]] = {  # what is new beside the head, what is active, rate
        "a head alone": ([], "new", HEAD_RATE),
        "a new adapter": ([BOTTLENECK], "new", 1e-3),
        "sst2 as it is": ([], "sst2 >> new", HEAD_RATE),
        "the mean of both": ([], "mean(sst2, subj) >> new", HEAD_RATE),
        "fuse(sst2, subj)": ([gw.Fusion(of=("sst2", "subj"))], "new", 1e-3),
    }
    scores: dict[str, list[float]] = {way: [] for way in ways}
    counts: dict[str, int] = {}
    weights: list[dict[str, list[float]]] = []
    for seed in range(size.seeds):
        rows = task.train.few(size.few, seed)
        for way, (methods, expression, rate) in ways.items():
            new = gw.graft(model, [*methods, gw.Full(at="head", outputs=len(task.classes))], "new", seed=seed)
            gw.activate(model, expression)
            fit(model, rows, epochs=size.epochs, lr=rate, head_lr=HEAD_RATE, seed=seed, batch=16)
            scores[way].append(accuracy(model, task.test))
            counts[way] = new.num_parameters
            if way.startswith("fuse"):
                weights.append({name: watched(model, task.test.of_class(i)) for i, name in enumerate(task.classes)})
            gw.remove(model, "new")
            say(f"{len(rows)} rows, seed {seed}, {way}: {scores[way][-1]:.3f}")
    found = [
        {
            "way": way,
            "trained": counts[way],
            "scores": of,
            "mean": statistics.mean(of),
            "deviation": statistics.stdev(of),
        }
        for way, of in scores.items()
    ]
    mean = {
        name: [statistics.mean(layer) for layer in zip(*(w[name] for w in weights), strict=True)]
        for name in task.classes
    }
    return {"rows": size.few, "tested": len(task.test), "classes": list(task.classes), "ways": found, "weights": mean}


@torch.inference_mode()
def watched(model: nn.Module, rows: Rows) -> list[float]:
    """The mean weight that the active fusion gives to sst2, layer by layer."""
    with gw.mixing_weights(model) as seen:
        for inputs, _ in rows.batches(32):
            model(**inputs)
    return [of["sst2"] for of in seen.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: the numbers mean nothing")
    parser.add_argument(
        "--out", type=Path, default=Path("demo/compose"), metavar="FOLDER", help="for figures and pictures"
    )
    chosen = parser.parse_args()
    if not (DATA / "sst2" / "train.tsv").exists():
        raise SystemExit(f"no data in {DATA}: set GRAFTWORK_DATA to a folder with sst2/ and subj/")
    size = QUICK if chosen.quick else Size()
    given, model = tasks(size), classifier()
    say(
        "; ".join(
            f"{name} {len(t.train):,} rows to learn from, {len(t.test):,} to test on" for name, t in given.items()
        )
    )
    figures: Figures = {"size": asdict(size), "threads": torch.get_num_threads()}
    figures["at once"] = at_once(model, given)
    figures["fusion"] = third(model, given["reviews"], size)
    figures["arithmetic"] = arithmetic(model, given["sst2"], size)
    figures["seconds"] = time.perf_counter() - START
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    pictures(figures, chosen.out)
    print(f"\n{tables(figures)}\n{chosen.out / 'figures.json'}, with two pictures beside it")
    say("done")
    if not all(f["equal"] for f in figures["at once"]):
        raise SystemExit("a branch gives other bits than its adapter alone")


if __name__ == "__main__":
    main()
