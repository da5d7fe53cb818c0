"""What the commands print: tables on a terminal, lines of JSON into a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
    """A table; numbers stand to the right."""
    body = [list(row) for row in rows]
    drawn = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold")
    for i, name in enumerate(columns):
        numbers = bool(body) and all(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in body)
        drawn.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in body:
        drawn.add_row(*map(shown, row))
    console.print(drawn)


def pairs(values: Mapping[str, Any], title: str = "") -> None:
    """Names and values in two columns."""
    table(("", ""), values.items(), title)


def shown(value: Any) -> str:
    """A value for people: thousands are separated, fractions have four digits. Brackets are no markup."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("[", "\\[")


def lines(rows: Iterable[Mapping[str, Any]], file: Any = None) -> None:
    """One JSON object a line."""
    for row in rows:
        print(json.dumps(row, ensure_ascii=False), file=file or sys.stdout)


def quiet() -> None:
    """Libraries keep to themselves: what matters is said by graftwork."""
    import warnings

    import datasets
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    warnings.filterwarnings("ignore", module=r"(transformers|torch|accelerate|datasets)\b.*")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    disable_progress_bars()
