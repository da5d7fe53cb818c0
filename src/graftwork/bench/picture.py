"""Scores against what they cost, as SVG that stands in a page: one point for each method, its interval, its name under the pointer."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from ..core.method import get
from .chosen import Task
from .summary import Cell

COSTS = (
    ("trained parameters beside the head", 1.0),
    ("seconds of training", 1.0),
    ("peak memory, MB", 2.0**20),
)
NAMED = 6  # methods whose names are written
COLOURS = {
    "weight": "#0072B2",
    "activation": "#D55E00",
    "attention": "#009E73",
    "input": "#CC79A7",
    "side": "#B8860B",
    "combinators": "#7A5195",
    "several": "#555555",
}


def family(label: str) -> str:
    """Where a method's file lies says what it changes: weight, activation, attention...; "several" for a sum."""
    name = re.match(r"\s*([\w-]+)", label)
    if name is None or "+" in label:
        return "several"
    parts = get(name[1]).__module__.split(".")
    found = next((part for part in parts if part in COLOURS), None)
    return found or "several"


def panels(task: Task, of: Sequence[Cell]) -> str:
    """The task's score against parameters, seconds and memory, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [cell for cell in of if cell.scores]
    with plt.rc_context(
        {"svg.hashsalt": task.name, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    ):
        figure, every = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
        for axes, (name, unit), which in zip(every, COSTS, range(3), strict=True):
            _panel(axes, task, shown, [(_cost(cell, which)) / unit for cell in shown])
            axes.set_xlabel(name)
        every[0].set_ylabel(f"{task.metric} on the test rows")
        present = [f for f in COLOURS if any(family(cell.entry.label) == f for cell in shown)]
        handles = [plt.Line2D([], [], marker="o", ls="", color=COLOURS[f], label=f) for f in present]
        figure.legend(handles=handles, loc="outside upper center", ncols=max(len(present), 1), frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    drawn = text.getvalue()
    return _titled(drawn[drawn.index("<svg") :], shown, task)


def _cost(cell: Cell, which: int) -> float:
    return (float(cell.entry.parameters), cell.time, cell.memory)[which]


def _panel(axes: Any, task: Task, shown: Sequence[Cell], costs: Sequence[float]) -> None:
    for i, (cell, cost) in enumerate(zip(shown, costs, strict=True)):
        colour = COLOURS[family(cell.entry.label)]
        made = axes.errorbar(
            cost, cell.mean, yerr=cell.half or 0, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.45
        )
        rim, inside = (colour, "white") if cell.lost else ("white", colour)  # a seed that failed leaves it hollow
        (dot,) = axes.plot(cost, cell.mean, "o", mfc=inside, ms=5.5, mec=rim, mew=0.6)
        dot.set_gid(f"point-{i}")
        made.lines[2][0].set_zorder(1)
    whole = [i for i, cell in enumerate(shown) if not cell.lost]
    best = sorted(whole, key=lambda i: -shown[i].mean if task.larger else shown[i].mean)[:NAMED]
    _names(axes, [(costs[i], shown[i].mean, shown[i].entry.label) for i in best])
    if costs and min(costs) > 0 and max(costs) > 8 * min(costs):
        axes.set_xscale("log")
    elif costs and max(costs) > 1000 and min(costs) == 0:
        above = min(cost for cost in costs if cost > 0)
        decade = math.floor(math.log10(above))
        axes.set_xscale("symlog", linthresh=10**decade, linscale=0.4)
        ticks = [0, *(10**i for i in range(decade, math.ceil(math.log10(max(costs)))))]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.margins(x=0.12)
    if shown:  # of two seeds an interval may be wider than all scores together: it is cut
        means = [cell.mean for cell in shown]
        room = max(max(means) - min(means), 0.02)
        axes.set_ylim(min(means) - 0.2 * room, max(means) + 0.35 * room)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _names(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside their points, from the top down in rows of their own so that none covers another."""
    for row, (x, y, name) in enumerate(sorted(points, key=lambda p: -p[1])):
        axes.annotate(
            name if len(name) < 24 else f"{name[:23]}…",
            (x, y),
            xycoords="data",
            xytext=(0.02, 0.98 - 0.055 * row),
            textcoords="axes fraction",
            va="top",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#999", "shrinkB": 3},
        )


def _titled(drawn: str, shown: Sequence[Cell], task: Task) -> str:
    """Each point says its method and numbers when the pointer is on it."""

    def title(match: re.Match[str]) -> str:
        cell = shown[int(match[1])]
        half = "" if cell.half is None else f" ± {cell.half:.3f}"
        said = f"{cell.entry.label}: {task.metric} {cell.mean:.4f}{half}, {cell.entry.parameters:,} parameters"
        return f"{match[0]}<title>{html.escape(said)}</title>"

    return re.sub(r'<g id="point-(\d+)">', title, drawn)
