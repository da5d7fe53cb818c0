"""Names of tensors on disk: "method index/site key/name"; "method index/shared/name" for what the sites share.

Names are data: a slash or percent sign within one is quoted, so that nothing is ever found by a part of a name.
"""

from __future__ import annotations

SHARED = "shared"  # no site key: those hold a colon


def key(index: int, site: str, name: str) -> str:
    """The name of one tensor."""
    return f"{index}/{_quote(site)}/{_quote(name)}"


def split(text: str) -> tuple[int, str, str]:
    """(method index, site key, name). ValueError for anything that `key` did not write."""
    index, site, name = text.split("/")
    if "%" in text:
        site, name = _unquote(site), _unquote(name)
    if key(int(index), site, name) != text:
        raise ValueError(text)
    return int(index), site, name


def _quote(text: str) -> str:
    return text.replace("%", "%25").replace("/", "%2F")


def _unquote(text: str) -> str:
    return text.replace("%2F", "/").replace("%25", "%")
