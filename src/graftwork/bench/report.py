"""The pages: index.html with pictures and tables, and a page for each method, none of which needs another file. The pictures, the
tables as Markdown and the runs as CSV lie beside them."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import GraftError
from .chosen import Entry, Task
from .picture import family, panels
from .published import PUBLISHED
from .runs import DONE, FAILED, OVER, Row
from .summary import Cell, cells, mean_rank, ranks
from .tables import lines, markdown, number, ordered, placed, ranked, score

if TYPE_CHECKING:
    from .work import Plan

PAGE, TABLES, RUNS, METHODS, PICTURES = "index.html", "tables.md", "runs.csv", "methods", "pictures"
STYLE = """
body{font:15px/1.55 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1.2rem;color:#1c1c1c;background:#fff}
h1{font-size:1.7rem}h2{margin-top:2.4rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}th,td{padding:.28rem .6rem;border-bottom:1px solid #e6e6e6;text-align:right;white-space:nowrap}
th{position:sticky;top:0;background:#fafafa}td.l,th.l{text-align:left}td.w{white-space:normal;text-align:left;max-width:44rem}
tr:hover td{background:#f5f8fc}code{font-size:12px}svg{max-width:100%;height:auto}
.note{color:#555}.best{font-weight:600}a{color:#0b5cad;text-decoration:none}a:hover{text-decoration:underline}
"""


def report(plan: Plan, rows: Sequence[Row], out: Path) -> Path:
    """Write the pages and the tables of these rows below `out`. Returns the first page."""
    names = [task.name for task in plan.tasks]
    rows = [row for row in rows if row.run.task in names]
    found = cells(plan.entries, rows)
    try:
        for folder in (METHODS, PICTURES):
            (out / folder).mkdir(parents=True, exist_ok=True)
        drawn = {task.name: panels(task, _of(task, found)) for task in plan.tasks}
        for name, picture in drawn.items():
            (out / PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")
        for label in dict.fromkeys(entry.label for entry in plan.entries):
            page = _page(f"{label}", _method(plan, rows, found, label))
            (out / METHODS / f"{_file(label)}.html").write_text(page, encoding="utf-8")
        (out / TABLES).write_text(markdown(plan, found), encoding="utf-8")
        (out / RUNS).write_text(lines(rows), encoding="utf-8")
        title = f"graftwork bench: {', '.join(task.name for task in plan.tasks)}"
        (out / PAGE).write_text(_page(title, _index(plan, rows, found, drawn)), encoding="utf-8")
    except OSError as error:
        raise GraftError(
            f"write to {str(out)!r}", str(error.strerror or error), "make room, or write elsewhere"
        ) from error
    return out / PAGE


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>"
    )


def _of(task: Task, found: dict[tuple[str, str], Cell]) -> list[Cell]:
    return [cell for (name, _), cell in found.items() if name == task.name]


def _index(plan: Plan, rows: Sequence[Row], found: dict[tuple[str, str], Cell], drawn: dict[str, str]) -> str:
    parts = [_protocol(plan, rows)]
    parts += ["<h2>Ranks</h2>", _rank_table(plan, found)]
    for task in plan.tasks:
        parts += [
            f"<h2>{html.escape(task.name)}</h2>",
            f'<div class="wide">{drawn[task.name]}</div>',
            _task_table(plan, task, _of(task, found)),
        ]
        parts += [_published(plan, task)]
    parts += ["<h2>Failures</h2>", _failures(found), "<h2>Left out</h2>", _left_out(plan.entries)]
    return "\n".join(parts)


def _protocol(plan: Plan, rows: Sequence[Row]) -> str:
    s, over = plan.settings, [r for r in rows if r.state in OVER]
    tasks = "; ".join(
        f"<b>{html.escape(t.name)}</b> ({html.escape(t.metric)}) on {html.escape(Path(t.backbone).name)}, {t.parameters:,} parameters, "
        + ("no budget" if t.budget is None else f"at most {t.budget:,} trained beside the head")
        for t in plan.tasks
    )
    length = f"{s.steps} steps" if s.steps else f"{s.epochs:g} passes over the training rows"
    failed = sum(r.state == FAILED for r in over)
    return (
        f"<p>Every method has the same backbone, rows, {length} of {s.batch} rows a step, the same learning rates to try "
        f"({html.escape(s.lrs)}{', x of its own default' if s.relative else ''}), once each on the dev rows, "
        f"and the same budget of parameters ({html.escape(s.budget)}), for which its "
        f"size is solved. The best rate is run with {s.seeds} seeds and scored on the test rows, which nothing else has seen. "
        f"± is half of the 95% confidence interval of the mean over seeds (Student's t).</p><p>{tasks}.</p>"
        f'<p class="note">{len(over):,} runs, {failed:,} of them failed; {len(rows) - len(over):,} to do. Seconds and memory are '
        f"medians; the pictures' seconds are the processor's where there is no accelerator. Memory is the peak of a run's own process, "
        f"libraries included. <code>full</code> is the linear probe: the head alone.</p>"
    )


def _table(headings: Sequence[str], body: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A table; the first `left` columns stand to the left. Cells are HTML already."""
    marks = [' class="l"' if i < left else "" for i in range(len(headings))]
    head = "".join(f"<th{m}>{h}</th>" for m, h in zip(marks, headings, strict=True))
    lines = ["<tr>" + "".join(f"<td{m}>{c}</td>" for m, c in zip(marks, row, strict=True)) + "</tr>" for row in body]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _link(label: str) -> str:
    return f'<a href="{METHODS}/{_file(label)}.html"><code>{html.escape(label)}</code></a>'


def _file(label: str) -> str:
    return re.sub(r"[^\w.-]+", "_", label).strip("_")[:80] or "method"


def _rank_table(plan: Plan, found: dict[tuple[str, str], Cell]) -> str:
    names = [task.name for task in plan.tasks]
    body = []
    for label, of in ranked(plan, found):
        scores = ["{} <span class='note'>{}</span>".format(*placed(found, label, of, task)) for task in plan.tasks]
        body.append((_link(label), family(label), f"{mean_rank(of):.1f}", *scores))
    note = (
        '<p class="note">In brackets the rank on the task among the methods that take part there; one that failed is last. '
        "The mean is over the tasks that a method takes part in.</p>"
    )
    return note + _table(("method", "changes", "mean rank", *map(html.escape, names)), body, left=2)


def _task_table(plan: Plan, task: Task, of: Sequence[Cell]) -> str:
    body = [
        (
            _link(c.entry.label),
            f"<code>{html.escape(c.entry.text)}</code>",
            score(c),
            f"{c.entry.parameters:,}",
            plan.settings.rate(c.lr),
            number(c.seconds, digits=1),
            number(c.cpu, digits=1),
            number(c.memory, 2**20),
            number(c.bytes, 1e3),
        )
        for c in ordered(task, of)
    ]
    heads = ("method", "as it is run", html.escape(task.metric), "trained", "lr", "s", "CPU s", "MB", "file, kB")
    return "<details open><summary>all methods, best first</summary>" + _table(heads, body, left=2) + "</details>"


def _published(plan: Plan, task: Task) -> str:
    if plan.settings.suite is None:
        return ""
    body = [
        (
            html.escape(p.method),
            html.escape(p.backbone),
            p.parameters,
            f"{p.scores[task.name]:.1f}",
            html.escape(p.source),
        )
        for p in PUBLISHED
        if p.suite == plan.settings.suite and task.name in p.scores
    ]
    heads = ("published", "backbone", "trained", f"{html.escape(task.metric)}, %", "source")
    return "<h3>As published</h3>" + _table(heads, body, left=2) if body else ""


def _failures(found: dict[tuple[str, str], Cell]) -> str:
    body = [
        (html.escape(name), _link(label), html.escape(reason))
        for (name, label), cell in found.items()
        for reason in cell.failures
    ]
    return _table(("task", "method", "what happened"), body, left=3) if body else "<p>None.</p>"


def _left_out(every: Sequence[Entry]) -> str:
    by: dict[tuple[str, str], list[str]] = {}
    for entry in every:
        if entry.reason:
            by.setdefault((entry.label, entry.reason), []).append(entry.task)
    body = [(f"<code>{html.escape(m)}</code>", ", ".join(tasks), html.escape(r)) for (m, r), tasks in by.items()]
    return _table(("method", "tasks", "why"), body, left=3) if body else "<p>None.</p>"


def _method(plan: Plan, rows: Sequence[Row], found: dict[tuple[str, str], Cell], label: str) -> str:
    """All runs of one method, tuning included."""
    parts = ['<p><a href="../index.html">all methods</a></p>']
    of = ranks(plan.tasks, found).get(label)
    if of:
        parts.append(
            f"<p>Mean rank {mean_rank(of):.1f} of {len(ranks(plan.tasks, found))}; changes: {family(label)}.</p>"
        )
    for task in plan.tasks:
        entry = next(e for e in plan.entries if (e.task, e.label) == (task.name, label))
        parts.append(f"<h2>{html.escape(task.name)}</h2>")
        if entry.reason:
            parts.append(f"<p>Left out: {html.escape(entry.reason)}</p>")
            continue
        text = f"<p><code>{html.escape(entry.text)}</code>, {entry.parameters:,} parameters beside the head"
        parts.append(f"{text}; {html.escape(task.metric)} {score(found[task.name, label])}</p>")
        mine = [r for r in rows if (r.run.task, r.run.label, r.run.text) == (task.name, label, entry.text)]
        body = [
            (
                "dev" if r.run.phase == "tune" else "test",
                plan.settings.rate(r.run.lr),
                r.run.seed,
                f"{r.result['score']:.4f}" if r.state == DONE else r.state,
                *(
                    (f"{r.result['seconds']:.1f}", f"{r.result['memory'] / 2**20:,.0f}", _scores(r))
                    if r.state == DONE
                    else ("", "", html.escape(str(r.result.get("reason", ""))))
                ),
            )
            for r in mine
        ]
        parts.append(_table(("rows", "lr", "seed", html.escape(task.metric), "s", "MB", "all scores"), body))
    return "\n".join(parts)


def _scores(row: Row) -> str:
    return html.escape(", ".join(f"{k} {v:.4g}" for k, v in row.result["scores"].items()))
