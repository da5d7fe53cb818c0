"""Where tokens enter a model (role "entry"), where their sequence is embedded ("embedded"), and where a stack of blocks ends ("top")."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core.site import Site
from .tree import Node, norm_width


def entries(root: Node, sites: Iterable[Site]) -> list[Site]:
    """The innermost modules whose forward takes `inputs_embeds` and that hold a token embedding and blocks.

    exit: path of the token embedding, whose output is the embedded sequence;  width: that of the embeddings.
    cross: a decoder that is fed by another entry (the encoder of an encoder-decoder).
    """
    known = list(sites)
    blocks = [s for s in known if s.role == "block"]
    crossing = [s.path for s in known if s.role == "attn" and s.cross]
    found: list[tuple[str, nn.Module, str, nn.Embedding]] = []
    for node in root.below:
        path, module = node.path, node.module
        if "inputs_embeds" in _parameters(type(module)) and any(_below(b.path, path) for b in blocks):  # type: ignore[arg-type]
            own = _table(path, module, blocks)
            if own is not None:
                found.append((path, module, *own))
    inner = [f for f in found if not any(_below(other[0], f[0]) for other in found if other is not f)]
    fed = {f[0]: any(_below(c, f[0]) for c in crossing) for f in inner}
    several = not all(fed.values())
    result = []
    for path, module, at, table in inner:
        tower = next(b.tower for b in blocks if _below(b.path, path))
        width = int(table.embedding_dim)
        result.append(Site(path, "entry", module, tower, cross=several and fed[path], exit=at, width=width))
    return result


def embeddings(root: Node, known: Iterable[Site]) -> list[Site]:
    """Where the sequence that enters is embedded, with all that is added to it and its norm; not in a decoder that another entry feeds.

    exit: path of the module around the tables (BERT's `embeddings`), or, where they stand beside the blocks, of the norm or the dropout
    that follows them, or of the token embedding.  unembed: the LM head's linear map back to tokens, where it has one of this width.
    """
    sites, nodes = list(known), {node.path: node for node in root.below}
    result = []
    for entry in (s for s in sites if s.role == "entry" and not s.cross):
        table = nodes.get(str(entry.exit))
        if table is None:  # one module under two paths, called for both towers
            continue
        place = _completed(table, nodes[entry.path], [s.path for s in sites if s.role == "block"])
        width = next((norm_width(n) for n in reversed(place.below) if n.kind == "norm"), None) or entry.width
        back = _unembedding(table.module, sites) if width == entry.width else None
        result.append(
            Site(place.path, "embedded", place.module, entry.tower, exit=place.path, unembed=back, width=width)
        )
    return result


def _completed(table: Node, entry: Node, blocks: list[str]) -> Node:
    """The module whose output is the whole embedded sequence."""
    around = table.parent
    if around is not None and around is not entry and not any(_below(block, around.path) for block in blocks):
        return around
    beside = [] if around is None else around.children
    norms = [node for node in beside if node.kind == "norm" and "emb" in node.name]
    first = next((n for n, node in enumerate(beside) if any(_below(block, node.path) for block in blocks)), 0)
    dropouts = [node for node in beside[:first] if isinstance(node.module, nn.Dropout)]
    return [table, *norms, *dropouts][-1]


def _unembedding(table: nn.Module, sites: list[Site]) -> str | None:
    """The LM head's map that is tied to the table, or else one of its shape."""
    own = table._parameters["weight"]
    heads = [s for s in sites if s.role == "lm_head" and isinstance(s.module, nn.Linear)]
    alike = [s for s in heads if own is not None and s.module._parameters["weight"].shape == own.shape]  # type: ignore[union-attr]
    tied = [s.path for s in alike if s.module._parameters["weight"] is own]
    return next(iter([*tied, *(s.path for s in alike)]), None)


def tops(sites: Iterable[Site], paths: Iterable[str]) -> list[Site]:
    """Where each tower's stack ends: the norm that stands beside its blocks and after them, or else its last block.

    exit: the path again, or None where another tower's cross-attention reads what comes out (an encoder).
    """
    known, order = list(sites), {path: i for i, path in enumerate(paths)}
    blocks: dict[str, list[Site]] = {}
    for site in known:
        if site.role == "block":
            blocks.setdefault(site.tower, []).append(site)
    crossed = {s.tower for s in known if s.role == "attn" and s.cross}
    result = []
    for tower, stack in blocks.items():
        last = max(stack, key=lambda s: s.layer or 0)
        beside = last.path.rpartition(".")[0].rpartition(".")[0]
        norms = [
            s for s in known
            if s.role == "norm" and s.path.rpartition(".")[0] == beside and order[s.path] > order[last.path]
            and "emb" not in s.path.rpartition(".")[2]
        ]  # fmt: skip
        place = norms[0] if norms else last
        exit = None if crossed and tower not in crossed else place.path
        result.append(Site(place.path, "top", place.module, tower, depth=last.depth, exit=exit, width=last.width))
    return result


@functools.cache
def _parameters(cls: Any) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(cls.forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _below(path: str, root: str) -> bool:
    return path != root and (not root or path.startswith(f"{root}."))


def _table(path: str, module: nn.Module, blocks: list[Site]) -> tuple[str, nn.Embedding] | None:
    """The token embedding and its path: the one the module names as its own, or the first outside of the blocks."""
    getter = getattr(module, "get_input_embeddings", None)
    try:
        own = getter() if getter is not None else None
    except NotImplementedError:
        own = None
    for name, inner in module.named_modules(remove_duplicate=False):
        full = ".".join(filter(None, (path, name)))
        if (
            isinstance(inner, nn.Embedding)
            and (own is None or inner is own)
            and not any(_below(full, b.path) for b in blocks)
        ):
            return full, inner
    return None
