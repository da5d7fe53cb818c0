"""How modules of this backbone are named in a config."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...sites.body import Body
from .config import ends


def named(paths: Iterable[str], body: Body) -> list[str] | str:
    """What names exactly these modules: the last words of their paths where that is enough, or the paths, or an expression."""
    wanted = set(paths)
    for names in ({path.rpartition(".")[2] for path in wanted}, wanted):
        if {path for path in body.modules if any(ends(path, name) for name in names)} == wanted:
            return sorted(names)
    return "|".join(re.escape(path) for path in sorted(wanted))


def exact(path: str) -> str:
    """The expression that matches this path only, in rank_pattern and alpha_pattern."""
    return f"^{re.escape(path)}"


def covering(paths: Iterable[str], body: Body) -> list[str]:
    """The outermost modules whose parameters all belong to these modules."""
    wanted = set(paths)
    owning = [path for path in body.modules if any(p is not None for p in body.modules[path]._parameters.values())]
    around = {path.rsplit(".", k)[0] for path in wanted for k in range(path.count(".") + 1)}
    whole = {above for above in around if all(path in wanted for path in owning if ends_in(path, above))}
    return [path for path in body.modules if path in whole and not any(ends_in(path, o) for o in whole - {path})]


def ends_in(path: str, above: str) -> bool:
    """Whether the module at `path` is that at `above`, or lies inside it."""
    return path == above or path.startswith(f"{above}.")
