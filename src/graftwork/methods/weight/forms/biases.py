"""What methods share that change a bias."""

from __future__ import annotations

from graftwork.core.errors import GraftError
from graftwork.core.site import Site


def require_bias(asked: str, site: Site, do: str) -> None:
    """GraftError where the site has no place for a bias: none of its own, or not for a slice of its rows."""
    w, kind = site.weight, type(site.module).__name__
    if w.bias is None or (site.rows is not None and site.module._parameters[w.bias] is None):
        raise GraftError(f"{asked} at {site.key}", f"{kind}, which has no place for a bias", do)
