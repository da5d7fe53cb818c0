"""Where a foreign module path is on this backbone: sites by the path of their module and the name of their parameter.

Only the backbone's own paths are looked at, never a table of model names.
"""

from __future__ import annotations

from ..core.errors import GraftError, nearest
from ..core.site import Site
from ..sites.body import Body
from ..sites.where import telling


def whole_site(body: Body, path: str, asked: str, param: str = "weight") -> Site:
    """The site of a whole parameter, under its most telling role. GraftError where the backbone has none."""
    found = body.once(_whole).get((path, param))
    if found is not None:
        return found
    if path not in body.modules:
        what = f"no module {path!r}{nearest(path, body.modules)}"
        raise GraftError(asked, what, "load the backbone that it was made for, with the same head")
    kind = type(body.modules[path]).__name__
    raise GraftError(asked, f"{path!r} is {kind}, whose {param!r} is no site", "it cannot be adapted here")


def owner_sites(body: Body, path: str) -> list[Site]:
    """One site for each module at or below `path` that owns parameters, in module order."""
    found: dict[str, Site] = {}
    for (at, _), site in body.once(_whole).items():
        if at == path or at.startswith(f"{path}."):
            found.setdefault(at, site)
    return [found[at] for at in body.modules if at in found]


def _whole(body: Body) -> dict[tuple[str, str], Site]:
    """Sites that stand for a whole parameter, by path and parameter; of several roles the most telling."""
    found: dict[tuple[str, str], Site] = {}
    for site in sorted(body.anatomy.sites, key=telling):
        if site.rows is None and site.module._parameters.get(site.param) is not None:
            found.setdefault((site.path, site.param), site)
    return found
