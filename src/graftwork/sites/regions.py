"""Which part of a model a module belongs to (body, head, lm_head, pooler), and which norm belongs to a sub-layer."""

from __future__ import annotations

from . import lexicon
from .sublayers import SubLayer
from .tree import Node, norm_width


def regions(root: Node, towers: set[int]) -> dict[int, str]:
    """id(node) -> "body", "head", "lm_head" or "pooler", from the names on the way, outside of repeated blocks.

    towers: ids of modules that hold repeated blocks. What is merely *called* something_head but holds such blocks (a
    diffusion head) is a tower.
    """
    found: dict[int, str] = {}

    def mark(node: Node, where: str) -> None:
        found[id(node)] = where
        for child in node.children:
            below = (
                where
                if where != "body"
                else "body"
                if id(child) in towers and child.name.isdigit()
                else _own(child, towers)
            )
            mark(child, below)

    mark(root, "body")
    return found


def _own(node: Node, towers: set[int]) -> str:
    """The region that a module opens by its own name or class."""
    cls = node.cls
    if node.name in lexicon.POOLER or lexicon.POOLER_CLASS.search(cls):
        return "pooler"
    if node.name in lexicon.LM_HEAD or lexicon.LM_HEAD_CLASS.search(cls):
        return "lm_head"
    if node.name in lexicon.HEAD or lexicon.HEAD_CLASS.search(cls):
        return "head"
    if lexicon.HEAD_NAME.search(node.name) and not any(_is_tower(n, towers) for n in node.below):
        return "head"
    return "body"


def _is_tower(node: Node, towers: set[int]) -> bool:
    return id(node) in towers and any(child.children for child in node.children)


def norm_of(sub: SubLayer, block: Node) -> Node | None:
    """The norm of a sub-layer, by the pairs of names that blocks use, nearest module first."""
    wanted = lexicon.MLP_NORMS if sub.role == "mlp" else lexicon.CROSS_NORMS if sub.cross else lexicon.ATTN_NORMS
    homes = [n for n in [sub.exit, *(sub.exit.up() if sub.exit else [])] if n is not None and n.under(block)]
    for home in homes:
        norms = {c.name: c for c in home.children if c.kind == "norm" and norm_width(c) in (sub.width, sub.d_in)}
        if home is sub.node and home is not block:
            norms = {name: c for name, c in norms.items() if name[:2] not in ("q_", "k_", "v_")}
        if len(norms) == 1 and home is not block:
            return next(iter(norms.values()))
        for name in wanted:
            if name in norms:
                return norms[name]
    inside = [c for c in block.children if c.kind == "norm"]
    return inside[0] if len(inside) == 1 else None
