"""Choosing sites: `select(anatomy, at, layers)`.

at      alternatives split by "|" (the first that finds all of its tokens is taken), each a comma list of tokens
token   [tower.][self.|cross.]role      "q", "decoder.cross.v", "vision.mlp", "expert.up"
        [tower.](attn.|mlp.)norm        the norms of these sub-layers
        /regex/                         searched in "path" and "path.param"
layers  "0-5,-1"                        counted in each tower by itself; negative numbers count from the end
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches

from ..core.errors import GraftError, nearest
from ..core.site import Site
from .anatomy import Anatomy

_LEAVES = "q k v kv qkv o up gate gate_up down expert.up expert.gate expert.gate_up expert.down router"
_PLACES = "attn mlp block embed norm head lm_head pooler linear conv any entry embedded top"
ROLES = tuple(f"{_LEAVES} {_PLACES}".split())
SUBLAYERS = ("attn", "mlp")


def select(anatomy: Anatomy, at: str | Callable[[Site], bool], layers: str | None = None) -> list[Site]:
    """The sites that `at` names, in the order of the tokens. GraftError where a token or the layers match nothing."""
    sites = [site for site in anatomy.sites if at(site)] if callable(at) else _by_text(anatomy, at)
    if not sites:
        raise GraftError(f"sites of {anatomy.name} chosen by a function", "none of them was accepted", _known(anatomy))
    return in_layers(sites, layers) if layers is not None else sites


def covers(site: Site, at: str | Callable[[Site], bool], layers: str | None = None) -> bool:
    """Whether one of the names in `at`, of whichever alternative, names this site, and it stands in `layers`."""
    alone = Anatomy("", (site,), (site.path,))
    names = [at] if callable(at) else [name for some in _split(at, "|") for name in _split(some, ",")]
    for name in names:
        try:
            return bool(select(alone, name, layers))
        except GraftError:
            continue
    return False


def _by_text(anatomy: Anatomy, at: str) -> list[Site]:
    error: GraftError | None = None
    for token in (t.strip() for alternative in _split(at, "|") for t in _split(alternative, ",")):
        if token and not token.startswith("/") and not any(token == r or token.endswith("." + r) for r in ROLES):
            _parse(anatomy, token, at)  # a word that is no role in any model is an error, also in a later alternative
    for alternative in _split(at, "|"):
        try:
            found: dict[str, Site] = {}
            for token in _split(alternative, ","):
                for site in _match(anatomy, token.strip(), at):
                    found.setdefault(site.key, site)
            return list(found.values())
        except GraftError as exception:
            error = error or exception
    assert error is not None
    raise error


def _split(text: str, mark: str) -> list[str]:
    """Split at `mark`, but not within /regex/."""
    parts, current, inside = [], "", False
    for index, letter in enumerate(text):
        if letter == "/" and (not inside or index == 0 or text[index - 1] != "\\"):
            inside = not inside if inside or not current.strip() else inside
        if letter == mark and not inside:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [*parts, current]


def _match(anatomy: Anatomy, token: str, at: str) -> list[Site]:
    if not token:
        raise GraftError(f"sites {at!r}", "an empty name", _known(anatomy))
    if token.startswith("/"):
        return _by_regex(anatomy, token, at)
    tower, side, role = _parse(anatomy, token, at)
    found = [
        site
        for site in _of(anatomy, role)
        if tower in ("", site.tower) and (side in ("", *SUBLAYERS) or site.cross == (side == "cross"))
    ]
    if side in SUBLAYERS:
        theirs = {site.norm for site in anatomy.of(side)}
        found = [site for site in found if site.path in theirs]
    if not found:
        raise GraftError(f"sites {token!r} of {anatomy.name}", _what_is(anatomy, token, role), _known(anatomy))
    return found


def _of(anatomy: Anatomy, role: str) -> list[Site]:
    """Sites of a role. A packed weight whose rows cannot be told apart answers as a whole for q, k and v."""
    if role not in ("q", "k", "v"):
        return [site for site in anatomy.sites if site.role == role]
    sliced = {(site.path, site.param) for site in anatomy.sites if site.role == "q" and site.rows is not None}
    return [
        site
        for site in anatomy.sites
        if site.role == role
        or (site.role == "kv" and role != "q")
        or (site.role == "qkv" and (site.path, site.param) not in sliced)
    ]


def _parse(anatomy: Anatomy, token: str, at: str) -> tuple[str, str, str]:
    """(tower, "self" | "cross" | "attn" | "mlp" | "", role) of a token."""
    role = next((r for r in sorted(ROLES, key=len, reverse=True) if token == r or token.endswith("." + r)), None)
    prefix = [] if role is None or token == role else token[: -len(role) - 1].split(".")
    if role is None:
        last = token.rpartition(".")[2]
        raise GraftError(f"sites {at!r}", f"no role {token!r}{nearest(last, ROLES)}", _hint(anatomy, token))
    sides = ("self", "cross", *(SUBLAYERS if role == "norm" else ()))
    side = prefix.pop() if prefix and prefix[-1] in sides else ""
    tower = ".".join(prefix)
    if tower and tower not in anatomy.towers:
        have = ", ".join(anatomy.towers) or "one tower only"
        raise GraftError(
            f"sites {at!r}",
            f"no tower {tower!r} in {anatomy.name}{nearest(tower, anatomy.towers)}",
            f"towers of this model: {have}",
        )
    return tower, side, role


def _by_regex(anatomy: Anatomy, token: str, at: str) -> list[Site]:
    if len(token) < 3 or not token.endswith("/"):
        raise GraftError(f"sites {at!r}", f"the expression {token!r} is not closed", "write it as /name.*part/")
    try:
        pattern = re.compile(token[1:-1])
    except re.error as error:
        raise GraftError(f"sites {at!r}", f"{token} is not a regular expression: {error}", "correct it") from None
    hits = [site for site in anatomy.sites if pattern.search(site.path) or pattern.search(f"{site.path}.{site.param}")]
    # "/attn/" also matches the modules around the weights; they are meant only where nothing below them matches.
    owning = [site for site in hits if site.param in site.module._parameters]
    found: dict[tuple[str, str], Site] = {}
    for site in sorted(owning or hits, key=telling):
        found.setdefault((site.path, site.param), site)
    if not found:
        raise GraftError(f"sites {token} of {anatomy.name}", "no module path matches", _hint(anatomy, token.strip("/")))
    order = {site.key: index for index, site in enumerate(anatomy.sites)}
    return sorted(found.values(), key=lambda site: order[site.key])


def telling(site: Site) -> int:
    """Which of the roles of one module a regular expression takes: a whole weight first, groups of modules last."""
    late = {
        "linear": 1,
        "conv": 1,
        "norm": 1,
        "embed": 1,
        "head": 1,
        "any": 2,
        "attn": 3,
        "mlp": 3,
        "block": 4,
    }
    return late.get(site.role, 0) + (5 if site.rows is not None else 0)


def in_layers(sites: list[Site], layers: str, word: str = "layers") -> list[Site]:
    """Those of the sites that stand in these layers. GraftError where a range of them has none. word: the option's name."""
    spans = []
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:\s*-\s*(-?\d+))?\s*", part)
        if match is None:
            raise GraftError(f"{word} {layers!r}", f"{part.strip()!r} is neither a number nor a range", "write 0-5,-1")
        spans.append((int(match[1]), int(match[2] if match[2] is not None else match[1])))
    placed = [site for site in sites if site.layer is not None]
    for first, last in spans:
        if not any(_within(site, first, last) for site in placed):
            depths = sorted({site.depth for site in placed})
            found = (
                f"these sites have {' or '.join(map(str, depths))} layers"
                if depths
                else "these sites stand in no layer"
            )
            text = str(first) if first == last else f"{first}-{last}"
            raise GraftError(
                f"{word} {layers!r}", f"{found}, none of them in {text}", "count from 0, or from -1 backwards"
            )
    return [site for site in placed if any(_within(site, first, last) for first, last in spans)]


def _within(site: Site, first: int, last: int) -> bool:
    assert site.layer is not None
    low = first + site.depth if first < 0 else first
    high = last + site.depth if last < 0 else last
    return low <= site.layer <= high


def _what_is(anatomy: Anatomy, token: str, role: str) -> str:
    same = {
        (f"{site.tower}." if site.tower else "") + ("cross." if site.cross else "") + role for site in anatomy.of(role)
    }
    return f"none; this model has {', '.join(sorted(same))}" if same else f"none; this model has no {role!r}"


def _known(anatomy: Anatomy) -> str:
    towers = f"; towers: {', '.join(anatomy.towers)}" if anatomy.towers else ""
    return f"choose among the roles {', '.join(anatomy.roles)}{towers}, or a /regex/ on module names"


def _hint(anatomy: Anatomy, token: str) -> str:
    last = token.rpartition(".")[2]
    leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in anatomy.paths if path))
    near = get_close_matches(last, leaves, n=1, cutoff=0.6)
    return _known(anatomy) + (f"; for modules by name write /{near[0]}/" if near else "")
