"""From the names of modules in a file to the backbone's own paths, and back. No table of models: only paths are compared.

A file's name of a module begins with its component (unet, text_encoder). The backbone is that component, or a module that
holds several of them under such names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import GraftError
from ...sites.body import Body

DEEPEST = 3  # words of wrappers in front of a path that the backbone may lack


@dataclass(frozen=True)
class Named:
    """A module's name in a file: component, and rest, the words behind it.  children: what a component is called here."""

    name: str
    rest: str
    component: str
    children: Sequence[str]


Ways = Callable[[str], Sequence[str]]  # how a format may write a path, the newest way first


def located(
    found: Iterable[Named], body: Body, ways: Ways, mark: str, asked: str
) -> tuple[dict[str, str], dict[str, str]]:
    """(the path of each name that the backbone has, in its order; what stands in front of the paths in these names).

    mark: what stands between the words of a name. Words in front that the backbone lacks (a wrapper) are left out where all
    names of a component share them. The second has a key per child of the backbone, or "" for the backbone itself.
    GraftError where a name means several modules, or several names mean one.
    """
    groups: dict[str, list[Named]] = {}
    for one in found:
        groups.setdefault(one.component, []).append(one)
    paths: dict[str, str] = {}
    leads: dict[str, str] = {}
    for group in groups.values():
        bases = ["", *(child for child in group[0].children if child in body.modules)]
        tables = {base: _table(body, base, ways) for base in bases}
        for one, hits in _group(group, tables, mark):
            if len(hits) > 1:
                several = ", ".join(sorted(path for path, _, _ in hits))
                raise GraftError(f"{asked}: {one.name!r}", f"several modules: {several}", "rename the key")
            paths[one.name], base, rest = hits[0]
            leads[base] = one.name.removesuffix(rest)
    _check_once(paths, asked)
    order = {path: i for i, path in enumerate(body.modules)}
    return dict(sorted(paths.items(), key=lambda item: order[item[1]])), leads


def _table(body: Body, base: str, ways: Ways) -> dict[str, list[str]]:
    """The modules that own a weight, by every way to write their paths behind `base`."""
    out: dict[str, list[str]] = {}
    for path, module in body.modules.items():
        inside = not base or path == base or path.startswith(f"{base}.")
        if inside and module._parameters.get("weight") is not None:
            for way in ways(path[len(base) :].removeprefix(".")):
                out.setdefault(way, []).append(path)
    return out


Hit = tuple[str, str, str]  # path, base, the rest of the name


def _group(
    group: Sequence[Named], tables: Mapping[str, dict[str, list[str]]], mark: str
) -> list[tuple[Named, list[Hit]]]:
    for cut in range(DEEPEST + 1):
        words = [one.rest.split(mark, cut) for one in group]
        if any(len(w) <= cut for w in words) or len({tuple(w[:cut]) for w in words}) > 1:
            break
        rests = [w[cut] for w in words]
        hits = [[(p, base, rest) for base, t in tables.items() for p in t.get(rest, ())] for rest in rests]
        # a wrapper that is left out must explain every name; a component may have more than this backbone
        if all(hits) or (not cut and any(hits)):
            return [(one, hit) for one, hit in zip(group, hits, strict=True) if hit]
    return []


def _check_once(found: Mapping[str, str], asked: str) -> None:
    first: dict[str, str] = {}
    for name, path in found.items():
        if path in first:
            what = f"{first[path]!r} and {name!r} both mean {path!r}"
            do = "load onto a module that holds each component under its name (unet, text_encoder, text_encoder_2)"
            raise GraftError(asked, what, do)
        first[path] = name


def name_of(path: str, leads: Mapping[str, str], ways: Ways) -> str:
    """The name of a path in a file."""
    base, _, rest = path.partition(".")
    return leads[base] + ways(rest)[0] if base in leads else leads[""] + ways(path)[0]


def read_leads(kept: Any) -> dict[str, str]:
    """What stands in front of the paths, as an adapter remembers it from its file."""
    return {k: v for k, v in kept.items() if isinstance(v, str)} if isinstance(kept, dict) else {}


def main_component(body: Body) -> str:
    """What the backbone itself is called where it is not told: by what it takes, and by the names of its own blocks."""
    if body.anatomy.of("entry") or body.anatomy.of("embed"):
        return "text_encoder"
    blocks = {path.partition(".")[0] for path in body.modules}
    return "transformer" if any(name.endswith("transformer_blocks") for name in blocks) else "unet"
