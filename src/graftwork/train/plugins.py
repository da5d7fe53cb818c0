"""Methods of the user's own: `graftwork --plugin my_method.py COMMAND ...` runs the file, which registers them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from ..core.errors import GraftError

RAN: list[str] = []  # what a process that this one starts must run too


def run(path: str) -> None:
    """Import the Python file at `path`. GraftError where there is none."""
    file = Path(path).expanduser()
    spec = importlib.util.spec_from_file_location(f"graftwork_plugin_{file.stem}", file)
    if file.suffix != ".py" or not file.is_file() or spec is None or spec.loader is None:
        raise GraftError(f"--plugin {path}", "no Python file of that name", "give a .py file that registers methods")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    RAN.append(str(file.resolve()))
