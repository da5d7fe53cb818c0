"""The command `graftwork`: one thin file per command, each imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..core.errors import GraftError, nearest

# command -> (module, one line of help): `graftwork --help` imports none of them
COMMANDS = {
    "train": ("train", "train an adapter on your data"),
    "predict": ("predict", "apply a trained adapter to texts or images"),
    "eval": ("evaluate", "score a trained adapter on labelled data"),
    "show": ("show", "what an adapter is made of and how it was trained"),
    "merge": ("merge", "write backbone and adapter as one plain transformers folder"),
    "export": ("export", "write an adapter in the format of another library"),
    "import": ("importing", "read an adapter of another library"),
    "push": ("push", "upload an adapter to the hub"),
    "check": ("check", "what an adapter's files hold, whether they will load, and what they cost"),
    "compose": ("compose", "make one new adapter out of several"),
    "convert": ("convert", "any adapter of weights as plain LoRA"),
    "extract": ("extract", "a LoRA out of a checkpoint that was tuned as a whole"),
    "bench": ("bench", "every method on the same tasks, with one budget of parameters"),
    "compare": ("compare", "several adapters side by side on labelled data"),
    "similar": ("similar", "the adapters of a folder that are most like one"),
    "methods": ("methods", "the methods: equation, hyper-parameters, source"),
    "anatomy": ("anatomy", "the parts of a backbone that an adapter can sit on"),
}

INTERRUPTED = 130  # as shells report a process ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for a problem of the input (said in plain words), 130 after
    Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    plugins = []
    while given[:1] == ["--plugin"]:
        plugins += given[1:2]
        given = given[2:]
    name = given[0] if given else ""
    if name not in COMMANDS:
        return _top(given, name)
    module = importlib.import_module(f".{COMMANDS[name][0]}", __name__)
    parser = argparse.ArgumentParser(
        prog=f"graftwork {name}", description=module.__doc__, formatter_class=Help, allow_abbrev=False
    )
    module.add(parser)
    parsed = parser.parse_intermixed_args(given[1:])  # texts may stand behind options
    try:
        for plugin in plugins:
            importlib.import_module("graftwork.train.plugins").run(plugin)
        return int(module.run(parsed) or 0)
    except GraftError as error:
        print(f"graftwork {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted{getattr(module, 'INTERRUPTED', '')}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has gone: `graftwork methods | head`
        sys.stderr.close()
        return 0


def _top(given: list[str], name: str) -> int:
    if name == "--version":
        from importlib.metadata import version

        print(f"graftwork {version('graftwork')}")
        return 0
    if name in ("", "-h", "--help"):
        print("usage: graftwork COMMAND [options]\n")
        print("Adapt a frozen pretrained model by training under 1% of its parameters.\n")
        for command, (_, text) in COMMANDS.items():
            print(f"  {command:<9} {text}")
        print("\nEach command explains itself: graftwork COMMAND --help. graftwork --version prints the version.")
        print("graftwork --plugin FILE.py COMMAND ... knows the methods that the file registers.")
        return 0 if given else 2
    print(f"graftwork: no command {name!r}{nearest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


class Help(argparse.RawDescriptionHelpFormatter):
    """Help texts with their defaults, in columns that fit."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)
