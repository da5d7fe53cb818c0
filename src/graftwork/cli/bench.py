"""Every method on the same backbone and data, with the same tuning effort and the same budget of parameters.

graftwork bench --backbone B --tasks sst2,subj,digits --methods all --budget 0.5% --seeds 3 --out bench
graftwork bench --backbone roberta-base --suite glue --tasks cola,rte --methods "lora, bottleneck, ia3 + bitfit" --out glue
graftwork bench ... --dry-run                       # the runs with the sizes that were solved, and no training
graftwork bench ... --report                        # the pages of the runs that are over, and no training

Each method's size is solved for the budget, learning rates are tried on the dev rows, the best one is run with every
seed and scored on the test rows. Runs are rows of --out/bench.sqlite: the same command goes on where it stopped, in as
many processes as you start. Tables and pictures are in --out/index.html.
"""

from __future__ import annotations

import argparse

from ..bench.settings import BenchSettings
from .options import add_options, read_options

INTERRUPTED = ": the runs that are over are in --out; the same command goes on from there"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_options(parser, BenchSettings)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="list the runs with solved sizes and counts, and stop")
    instead.add_argument("--report", action="store_true", help="write the report of the runs that are over, and stop")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    settings = read_options(BenchSettings, parsed)
    from ..bench.work import bench, plan, written
    from .console import console, errors, quiet, table
    from .progress import Runs

    quiet()

    def say(text: str) -> None:
        errors.print(text, markup=False)

    if parsed.dry_run:
        planned = plan(settings, say)
        here = [e for e in planned.entries if not e.reason]
        table(("task", "method", "as it is run", "parameters"), [(e.task, e.label, e.text, e.parameters) for e in here])
        out = [(e.task, e.label, e.reason) for e in planned.entries if e.reason]
        if out:
            table(("task", "left out", "why"), out)
        from ..bench.runs import expected

        console.print(f"{expected(planned.entries, settings):,} runs")
        return 0
    if parsed.report:
        page = written(settings, say)
    else:
        with Runs() as bar:
            page = bench(settings, say, bar.tell)
    console.print(f"written to {page}", markup=False)
    return 0
