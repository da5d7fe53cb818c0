"""What examples/compose.py found, as tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
CURVES = {  # what is drawn over c: its name in the figures, and in the picture
    "effects": "c one + (1 - c) two",
    "parameters": "their parameters, one start",
    "parameters apart": "their parameters, two starts",
}


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown, three digits for what is no whole number."""
    told = [
        [f"{x:.3f}" if isinstance(x, float) else f"{x:,}" if type(x) is int else str(x) for x in row] for row in rows
    ]
    lines = [list(headings), ["---"] * len(headings), *[[cell.replace("|", "\\|") for cell in row] for row in told]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(figures: Figures) -> str:
    once = table(
        ("what is active", "adapters", "SST-2", "Subj", "two passes, ms", "one, ms", "ratio"),
        [
            (
                f"`{f['expression']}`",
                f["adapters"],
                f["sst2"],
                f["subj"],
                round(f["ms each"]),
                round(f["ms both"]),
                f["ratio"],
            )
            for f in figures["at once"]
        ],
    )
    sums = table(
        ("what is active", "what it is", "SST-2"),
        [(f"`{f['expression']}`", f["what"], f["accuracy"]) for f in figures["arithmetic"]["ways"]],
    )
    fused = table(
        ("what is trained", "parameters", "mean", "deviation", "each seed"),
        [
            (w["way"], w["trained"], w["mean"], w["deviation"], " ".join(f"{score:.3f}" for score in w["scores"]))
            for w in figures["fusion"]["ways"]
        ],
    )
    return "\n".join([once, sums, fused])


def pictures(figures: Figures, out: Path) -> None:
    """factors.png: accuracy over c;  fusion.png: what the fusions attend to."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = figures["arithmetic"]
    score = {w["expression"]: w["accuracy"] for w in found["ways"]}
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for (curve, scores), style in zip(found["curves"].items(), ("o-", "s--", "^:"), strict=True):
        axes.plot(found["factors"], scores, style, label=CURVES[curve])
    axes.axhline(score["all"], color="black", linewidth=0.8, label="one adapter, trained on all rows")
    axes.set(xlabel="c", ylabel="accuracy on SST-2")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "factors.png", dpi=130)
    plt.close(figure)

    weights = figures["fusion"]["weights"]
    grid = list(zip(*weights.values(), strict=True))
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    picture = axes.imshow(grid, vmin=0, vmax=1, cmap="coolwarm", aspect="auto", origin="lower")
    for layer, row in enumerate(grid):
        for i, w in enumerate(row):
            axes.text(i, layer, f"{w:.2f}", ha="center", va="center")
    axes.set_xticks(range(len(weights)), list(weights))
    axes.set(ylabel="layer", title="what the fusion attends to")
    figure.colorbar(picture, label="mean weight of sst2 (the rest is subj's)")
    figure.savefig(out / "fusion.png", dpi=130)
    plt.close(figure)
