"""Train an adapter: the backbone stays frozen, and what is trained is written to --out as a file of a few MB.

graftwork train --backbone roberta-base --data reviews.csv --method "lora(r=8)" --out adapters/reviews
torchrun --nproc-per-node 2 -m graftwork.cli train ...           # or: accelerate launch -m graftwork.cli train ...
"""

from __future__ import annotations

import argparse

from ..train.settings import TrainSettings
from .options import add_options, read_options

INTERRUPTED = ": the last checkpoint is in --out; the same command with --resume goes on from it"


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_options(parser, TrainSettings)


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    settings = read_options(TrainSettings, parsed)
    from ..train.arguments import processes
    from ..train.run import train
    from .console import console, errors, pairs, quiet
    from .progress import Bar

    quiet()
    first = processes(settings.fit).is_main_process
    bar = Bar()
    try:
        result = train(settings, [bar], lambda text: errors.print(text, markup=False) if first else None)
    finally:
        bar.close()
    if first:
        share = 100 * result.parameters / max(result.backbone_parameters, 1)
        facts = {
            "trained parameters": f"{result.parameters:,} ({share:.3f}% of the backbone)",
            "seconds": round(result.seconds, 1),
            "peak memory": f"{result.peak_bytes / 2**20:,.0f} MB",
        }
        pairs({**result.metrics, **facts})
        console.print(f"saved to {result.folder}", markup=False)
    return 0
