"""Upload an adapter to the Hugging Face hub as one commit, with its model card.

graftwork push adapters/sst2 NAME/sst2-lora --private

The address that is printed, with its commit, stands for a folder everywhere: graftwork predict hub:NAME/sst2-lora ...
"""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", help="a folder with an adapter, as safetensors; its other files stay here")
    parser.add_argument("repo", metavar="NAME/REPO", help="the repository; made where it is missing")
    parser.add_argument("--private", action="store_true", help="make it private; a public one is refused")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to commit to; made where it is missing")
    parser.add_argument("--message", metavar="TEXT", help="what the commit says")


def run(parsed: argparse.Namespace) -> int:
    """Do what the options ask for. Returns the exit code."""
    import graftwork.combinators
    import graftwork.methods  # noqa: F401  (both register the names in the file)

    from ..store.hub import push
    from .console import console, quiet

    quiet()
    made = push(parsed.folder, parsed.repo, parsed.private, parsed.revision, parsed.message)
    console.print(made, markup=False, soft_wrap=True)
    return 0
