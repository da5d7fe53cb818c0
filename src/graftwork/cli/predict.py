"""Apply a trained adapter.

  graftwork predict adapters/sst2 "a gorgeous, witty, seductive movie"
  graftwork predict adapters/sst2 --file texts.txt --out predictions.jsonl

--file takes one text per line (.txt), or a .csv .tsv .jsonl .parquet with the columns of the training data. Into a
pipe or --out, each prediction is a line of JSON. For an image task, the arguments are image files; a chat is
continued from one user message.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_expression


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="the folder that graftwork train wrote, or hub:NAME/REPO")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts (or image files)")
    parser.add_argument("--pair", action="append", metavar="TEXT", help="second text of a pair, once for each text")
    parser.add_argument(
        "--of-task", metavar="NAME", help="the texts' task, where the adapter learnt something for each"
    )
    parser.add_argument("--file", metavar="PATH", help="texts from a file")
    parser.add_argument("--out", metavar="PATH", help="write lines of JSON to this file")
    parser.add_argument(
        "--backbone", metavar="NAME|FOLDER", help="the backbone, where it is not what the adapter's file says"
    )
    add_expression(parser)
    parser.add_argument("--batch", type=int, default=32, metavar="INT", help="texts at a time (default: 32)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="INT", help="length of generated texts (default: 64)"
    )


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    from ..core.errors import GraftError

    if bool(parsed.texts) == bool(parsed.file):
        raise GraftError(
            "texts to predict", "both or neither of TEXT and --file", "give texts in quotes, or --file texts.txt"
        )
    if parsed.pair and len(parsed.pair) != len(parsed.texts):
        raise GraftError(
            "pairs of texts", f"{len(parsed.texts)} texts, {len(parsed.pair)} --pair", "give one --pair for each text"
        )
    out = Path(parsed.out).expanduser() if parsed.out else None
    if out is not None and not out.parent.is_dir():
        raise GraftError(f"write to {parsed.out!r}", "no such folder", "create it first")
    from ..train.trained import open_trained, rows_of
    from .console import console, lines, quiet, table

    quiet()
    trained = open_trained(parsed.adapter, parsed.backbone, parsed.more, parsed.expression)
    if parsed.file:
        rows = _from_file(parsed.file, trained.task)
    else:
        texts: list[Any] = parsed.texts
        if trained.task.columns.kind == "messages":
            texts = [[{"role": "user", "content": text}] for text in texts]
        rows = rows_of(trained.task, texts, parsed.pair, parsed.of_task)
    found = trained.predict(rows, parsed.batch, parsed.max_new_tokens)
    joined = [{"input": row[trained.task.columns.text], **answer} for row, answer in zip(rows, found, strict=True)]
    if out is not None:
        with out.open("w", encoding="utf-8") as file:
            lines(joined, file)
        console.print(f"{len(joined):,} predictions written to {out}", markup=False)
    elif console.is_terminal:
        names = [name for name in joined[0] if name != "scores"]
        table(names, [[row[name] for name in names] for row in joined])
    else:
        lines(joined)
    return 0


def _from_file(path: str, task: Any) -> list[dict[str, Any]]:
    from ..core.errors import GraftError, nearest
    from ..train.data import read

    rows = next(iter(read(path).values()))
    wanted = [name for name in (task.columns.text, task.columns.pair, task.columns.task) if name]
    names = list(rows.column_names)
    if names == ["text"] and len(wanted) == 1 and wanted != names:
        rows, names = rows.rename_column("text", wanted[0]), wanted
    for name in wanted:
        if name not in names:
            raise GraftError(
                f"the column {name!r} of {path}", f"{', '.join(names)}{nearest(name, names)}", "name it as in training"
            )
    return list(rows.select_columns(wanted))
