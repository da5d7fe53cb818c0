"""What an adapter's files hold, of whatever format: methods, shapes, for which backbone, whether they will load, what that
costs, and what the library that owns the format would leave out without a word. No weights are needed.

graftwork check peft/sst2
graftwork check hub:NAME/REPO --backbone roberta-base       # tries it on that model

Exit code 0 where it loads (or nothing speaks against it, without --backbone), 1 where it does not.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..formats.check import Report


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("adapter", help="a folder or file of any format, or hub:NAME/REPO")
    parser.add_argument("--backbone", metavar="NAME|FOLDER", help="load it onto this model, with its weights")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    import graftwork.combinators
    import graftwork.methods  # noqa: F401  (both register the names in a file)

    from ..core.errors import GraftError
    from ..formats.check import check
    from .console import lines, quiet

    quiet()
    report = check(parsed.adapter)
    if parsed.backbone and report.format is not None:
        from ..train.origin import open_backbone

        try:
            model, _ = open_backbone(report.place, parsed.backbone)
            report = check(report.place, model)
        except GraftError as error:  # of the backbone, or of files that do not even say which class it has
            report.said.problems.append(f"{error.asked}: {error.found}")
            report.loads = False
    if parsed.json:
        lines([report.to_json()])
    else:
        _print(report)
    return 1 if report.loads is False else 0


def _print(report: Report) -> None:
    from .console import console, pairs, table

    share = "" if report.share is None else f" ({100 * report.share:.3f}% of the backbone)"
    facts: dict[str, Any] = {
        "format": report.format or "unknown",
        "backbone": report.backbone or "not named",
        "class": report.model or "not named",
        "parameters": f"{report.parameters:,}{share}",
        "bytes": f"{report.bytes:,} of tensors, {sum(report.files.values()):,} on disk",
        "dtype": ", ".join(report.dtypes) or "none",
        "smaller sides": _numbers(report.ranks),
        "larger sides": _numbers(report.widths),
        "layers": f"{len(report.layers)}: {_numbers(report.layers)}" if report.layers else "none named",
        "finite": {True: "yes", False: "no", None: "nothing was read"}[report.finite],
        "files": ", ".join(f"{name} ({size:,})" for name, size in report.files.items()) or "none",
        "pickles": ", ".join(report.pickles) or "none",
    }
    pairs(facts, report.place)
    if report.said.methods or report.said.options:
        methods = {f"method {i}": text for i, text in enumerate(report.said.methods, 1)}
        pairs({**methods, **report.said.options})
    if report.groups:
        rows = [(g.name, g.count, "x".join(map(str, g.shape)) or "one", g.parameters) for g in report.groups]
        table(("tensors", "how many", "shape", "parameters"), rows)
    for title, texts in (
        ("ignored by its own library", report.said.ignored),
        ("notes", report.said.notes),
        ("problems", report.said.problems),
    ):
        if texts:
            table((title,), [[text] for text in texts])
    onto = f" onto {report.onto}" if report.onto else ""
    verdict = {True: f"loads{onto}", False: f"does not load{onto}"}
    unknown = "nothing in the files speaks against it; whether names and shapes fit a model, --backbone says"
    console.print(verdict.get(report.loads, unknown) if report.loads is not None else unknown, markup=False)


def _numbers(values: list[int]) -> str:
    """Some numbers; a run of them by its ends."""
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
