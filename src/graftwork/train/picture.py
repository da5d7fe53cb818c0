"""A picture of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.errors import GraftError
from .compare import Compared
from .tasks import Task

TYPES = (".png", ".svg", ".pdf")


def check_picture(file: Path) -> None:
    """GraftError where no picture can be written there."""
    if file.suffix.lower() not in TYPES:
        raise GraftError(f"a picture {str(file)!r}", f"the ending {file.suffix!r}", f"use one of {', '.join(TYPES)}")
    if not file.parent.is_dir():
        raise GraftError(f"a picture {str(file)!r}", "no such folder", "create it first")


def draw(task: Task, compared: Sequence[Compared], file: Path, title: str) -> None:
    """The task's main score of each against its parameters, and its time, in one file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [one.name if len(one.name) <= 32 else f"{one.name[:31]}…" for one in compared]
    colours = [f"C{i % 10}" for i in range(len(compared))]
    height = 1.6 + 0.36 * len(compared)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, max(height, 3.2)), layout="constrained", sharey=True)
    for axes, values, label, shown in (
        (left, [one.scores.get(task.best, float("nan")) for one in compared], task.best, "{:.4g}"),
        (right, [one.seconds for one in compared], "seconds for 1000 rows", "{:.3g}"),
    ):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, labels=[shown.format(value) for value in values], padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    left.set_yticks(
        range(len(names)), [f"{n}\n{one.parameters:,} parameters" for n, one in zip(names, compared, strict=True)]
    )
    figure.suptitle(title)
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise GraftError(f"a picture {str(file)!r}", str(error.strerror or error), "write it elsewhere") from error
    finally:
        plt.close(figure)
