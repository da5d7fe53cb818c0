"""How wide the keys and values of an attention are, read from its projections."""

from __future__ import annotations

from ..core.errors import GraftError
from ..core.site import Site
from .projections import find_attention
from .sublayers import Part
from .tree import dims, tree


def widths(site: Site) -> tuple[int, int]:
    """(d_k, d_v) of an attn site: key-value heads times their sizes. GraftError where its projections do not say."""
    found = find_attention(tree(site.module), set())
    if len(found) == 1:
        sub = found[0]
        keys, values, packed, outputs = (sub.of(role) for role in ("k", "v", "qkv", "o"))
        if keys and values:
            return _width(keys[0]), _width(values[0])
        if packed and outputs:  # q, k and v are interleaved head by head
            rest = dims(packed[0].node.module)[0] - dims(outputs[0].node.module)[1]
            if rest > 0 and rest % 2 == 0:
                return rest // 2, rest // 2
        sizes = [getattr(site.module, name, None) for name in ("num_heads", "qk_head_dim", "v_head_dim")]
        if sub.of("kv") and all(
            isinstance(size, int) for size in sizes
        ):  # low-rank keys and values (MLA), rebuilt per query head
            heads, d_key, d_value = (int(size) for size in sizes if size is not None)
            return heads * d_key, heads * d_value
    raise GraftError(
        f"the keys and values of {site.key}",
        f"{type(site.module).__name__} has {len(found)} attentions, none with key and value projections of known width",
        "choose other sites with at=",
    )


def _width(part: Part) -> int:
    return part.rows[1] - part.rows[0] if part.rows is not None else dims(part.node.module)[0]
