"""The attention sub-layers of a block: q, k, v (or packed qkv, or low-rank pairs) and o.

Names propose, structure decides: an output projection must take what the values give.
"""

from __future__ import annotations

from torch import nn

from . import lexicon
from .sublayers import Part, SubLayer, common, leaving, owner
from .tree import Node, dims

_ROLES = (("q", lexicon.Q), ("k", lexicon.K), ("v", lexicon.V), ("qkv", lexicon.QKV), ("kv", lexicon.KV))
_INSIDE = (("q", lexicon.Q_INSIDE), ("k", lexicon.K_INSIDE), ("qkv", lexicon.QKV_INSIDE))


def attention_role(leaf: Node) -> str:
    """The proposed role of a leaf in an attention; empty where its name says nothing."""
    name, home = leaf.telling, owner(leaf)
    if home.speaks_of(lexicon.MLP) and not home.speaks_of(lexicon.ATTENTION):
        return ""
    near = [home, *([home.parent] if home.parent is not None else [])]
    inside = _INSIDE if any(n.speaks_of(lexicon.ATTENTION) for n in near) else ()
    return next((role for role, words in (*_ROLES, *inside) if name in words), "")


def find_attention(block: Node, skip: set[int]) -> list[SubLayer]:
    """The attention sub-layers at or under `block`. Nodes in `skip` belong to somebody else."""
    result = [_packed_module(n) for n in block.below if n.kind == "mha" and id(n) not in skip]
    skip = skip | {id(n) for sub in result for n in sub.node.below}
    groups: dict[int, tuple[Node, list[Part]]] = {}
    for leaf in block.weighty:
        if id(leaf) not in skip and (role := attention_role(leaf)):
            home = owner(leaf)
            groups.setdefault(id(home), (home, []))[1].append(Part(leaf, role))
    for home, parts in _joined(list(groups.values()), block):
        sub = SubLayer("attn", home, parts)
        if home is block and not sub.of("qkv") and not (sub.of("q") and sub.of("k", "v", "kv")):
            continue
        _find_output(sub, block, skip)
        called = home.speaks_of(lexicon.ATTENTION)
        if sub.of("qkv") or (sub.of("q") and (called or sub.of("k", "v", "kv", "o"))) or (sub.of("kv") and called):
            result.append(_finish(sub, block))
    return result


def _joined(groups: list[tuple[Node, list[Part]]], block: Node) -> list[tuple[Node, list[Part]]]:
    """Join the pieces of one attention that have different owners (a query here, keys and values there)."""
    result: list[tuple[Node, list[Part]]] = []
    for home, parts in groups:
        roles = {part.role for part in parts}
        if result:
            other_home, other = result[-1]
            has = {part.role for part in other}
            apart = not (roles & has) and "qkv" not in roles | has
            whole = "q" in has and has & {"k", "kv"} and has & {"v", "kv"}
            both = common([home, other_home])
            near = both in (home, other_home, home.parent) and both.under(block)
            if apart and near and not whole:
                result[-1] = (both, other + parts)
                continue
        result.append((home, parts))
    return result


def _packed_module(node: Node) -> SubLayer:
    """torch.nn.MultiheadAttention: its projections are read, never called, so it is entered and left as a whole."""
    module = node.module
    assert isinstance(module, nn.MultiheadAttention)
    d = module.embed_dim
    if module.in_proj_weight is not None:
        parts = [Part(node, role, "in_proj_weight", (i * d, (i + 1) * d)) for i, role in enumerate("qkv")]
        parts.append(Part(node, "qkv", "in_proj_weight"))
    else:
        parts = [Part(node, role, f"{role}_proj_weight") for role in "qkv"]
    parts += [Part(child, "o") for child in node.children if child.kind == "linear"]
    sub = SubLayer("attn", node, parts, node, node, heads=module.num_heads, width=d, d_in=d)
    sub.cross = _is_cross(node, node)
    return sub


def _find_output(sub: SubLayer, block: Node, skip: set[int]) -> None:
    """Add the output projections: by name and shape, in the attention's module, or one or two levels above."""
    taken = {id(part.node) for part in sub.parts} | skip
    node = sub.node
    for climb in range(3):
        fits = [
            leaf
            for leaf in node.weighty
            if id(leaf) not in taken
            and leaf.kind in ("linear", "conv")
            and _takes_values(leaf, sub)
            and not any(_is_mlp(up) for up in leaf.up() if up.under(node) and up is not node)
        ]
        named = [leaf for leaf in fits if {leaf.telling, leaf.name, _above(leaf)} & lexicon.O]
        if climb and node is block:
            named = [leaf for leaf in named if lexicon.ATTENTION.search(leaf.path[len(block.path) :].lower())]
        alone = len(fits) == 1 and climb == 0 and node is not block and dims(fits[0].module)[0] == _d_in(sub)
        chosen = named or (fits if alone else [])
        if chosen:
            first = next((leaf for leaf in chosen if "o_" in leaf.name or "out" in leaf.telling), chosen[0])
            several = [
                leaf for leaf in chosen if leaf.telling in ("layout_output", "out_text_proj", "o_a_proj", "o_b_proj")
            ]
            sub.parts += [Part(leaf, "o") for leaf in dict.fromkeys([first, *several])]
            sub.node = common([sub.node, *(part.node for part in sub.of("o"))])
            return
        if node is block or node.parent is None or not node.parent.under(block):
            return
        node = node.parent
        others = {id(leaf) for leaf in node.weighty if leaf.kind == "mha" or attention_role(leaf) in ("q", "qkv")}
        if not others <= {id(part.node) for part in sub.parts}:
            return


def _is_mlp(node: Node) -> bool:
    return node.speaks_of(lexicon.MLP) and len(node.weighty) > 1


def _above(leaf: Node) -> str:
    """The name of the wrapper around a leaf that says nothing itself (`projection.linear`)."""
    return leaf.parent.name if leaf.parent is not None and leaf.name in lexicon.GENERIC else leaf.name


def _takes_values(leaf: Node, sub: SubLayer) -> bool:
    """Does the leaf's input have the width that the attention gives? Grouped values are repeated, packs hold more."""
    d_in = dims(leaf.module)[1]
    packed = [dims(part.node.module)[0] for part in sub.of("qkv")]
    if packed:
        return d_in < packed[0]
    widths = [dims(part.node.module)[0] for part in sub.of("v")] or [dims(p.node.module)[0] for p in sub.of("q")]
    if sub.of("kv"):
        return True
    return any(width and (d_in % width == 0 or width % d_in == 0) for width in widths)


def _finish(sub: SubLayer, block: Node) -> SubLayer:
    queries, outputs = sub.of("q", "qkv"), sub.of("o")
    sub.entry = queries[0].node if queries else sub.node
    sub.exit = leaving(outputs[-1 if _in_row(outputs) else 0].node) if outputs else sub.node
    sub.d_in = _d_in(sub)
    sub.width = dims(outputs[-1 if _in_row(outputs) else 0].node.module)[0] if outputs else sub.d_in
    sub.cross = _is_cross(sub.node, block)
    _unpack(sub)
    return sub


def _d_in(sub: SubLayer) -> int:
    return dims(sub.of("q", "qkv", "kv")[0].node.module)[1]


def _in_row(outputs: list[Part]) -> bool:
    """A low-rank output (o_a then o_b): the last one gives the result."""
    return len(outputs) > 1 and outputs[-1].node.telling == "o_b_proj"


def _is_cross(node: Node, block: Node) -> bool:
    """Cross-attention by the names between the block and the attention; the nearest name that says so wins."""
    if lexicon.CROSS.search(node.name):
        return True
    if "self" in node.name:
        return False
    for step in [node, *node.up()]:
        if step is block and step is not node:
            return False
        if lexicon.CROSS.search(step.cls) or lexicon.CROSS.search(step.name):
            return True
        if "self" in step.name:
            return False
        if step is block:
            return False
    return False


def _unpack(sub: SubLayer) -> None:
    """Add q, k, v as rows of a packed weight whose layout is known."""
    packed, outputs = sub.of("qkv"), sub.of("o")
    if len(packed) != 1 or sub.of("q", "k", "v"):
        return
    part, module = packed[0], owner(packed[0].node).module
    name, total = part.node.telling, dims(part.node.module)[0]
    known = name in lexicon.CONTIGUOUS and getattr(module, lexicon.BLOCKS_FLAG, True)
    grouped = name in lexicon.CONTIGUOUS_IF_GROUPED and any(hasattr(module, flag) for flag in lexicon.GROUPED)
    query = dims(outputs[0].node.module)[1] if outputs else total // 3
    half, odd = divmod(total - query, 2)
    if not (known or grouped) or odd or half <= 0 or query % half:
        return
    for role, rows in (("q", (0, query)), ("k", (query, query + half)), ("v", (query + half, total))):
        sub.parts.append(Part(part.node, role, part.param, rows))


def heads_of(part: Part, sub: SubLayer, heads: int | None) -> int | None:
    """Heads of a projection's output: the queries' number, or how many heads of their size the keys and values hold."""
    if part.role in ("q", "qkv") or heads is None:
        return heads if part.role in ("q", "qkv") else None
    query = next(iter(sub.of("q")), None)
    if part.role not in ("k", "v") or query is None or query.node.telling in lexicon.Q_INSIDE:
        return None
    d, d_query = (p.rows[1] - p.rows[0] if p.rows else dims(p.node.module)[0] for p in (part, query))
    return d * heads // d_query if d * heads % d_query == 0 else None
