"""Where AdapterHub's bottlenecks stand in a block: its three flags, and the sites and positions that are the same here."""

from __future__ import annotations

from typing import Any

from ...core.errors import GraftError
from ...core.site import Site
from ..config import Config
from .names import Block, Names

FLAGS = {"self": "mh_adapter", "cross": "cross_adapter", "mlp": "output_adapter"}


def scheme(config: Config) -> str:
    """What an adapter reads: the sub-layer's "output", the "sum" with the residual stream (kept out of the skip), the
    "stream" itself, or, "parallel", the sub-layer's input. GraftError for combinations that graftwork does not have."""
    before = config.take("original_ln_before", bool, False)
    after = config.take("original_ln_after", bool, True)
    skip = config.take("residual_before_ln", (bool, str), True)
    if config.take("is_parallel", bool, False):
        if not after:
            raise config.error("is_parallel with original_ln_after = False", "the residual stream would be lost")
        return "parallel"
    if not before and after and skip is True:
        return "output"
    if before and after and skip is True:
        return "sum"
    if before and not after and skip is False:
        return "stream"
    found = f"original_ln_before = {before}, original_ln_after = {after}, residual_before_ln = {skip!r}"
    raise config.error(found, "graftwork has no adapter with this skip")


def place(kind: str, names: Names, block: Block, which: str, config: Config) -> tuple[str, Site]:
    """(position, site) of a scheme at a sub-layer."""
    sub, behind = block.subs[which], names.normed_after(block, which)
    if kind == "output":
        return "after", sub
    if kind == "parallel":
        return ("parallel" if behind else "residual"), sub
    if not behind:  # without a norm behind the add, both schemes compute the same
        return "sum", sub
    norm = names.norm_site(block, which)
    if norm is None:
        raise config.error(f"an adapter that reads the {kind} at {sub.path}", "the norm behind it is not known here")
    return ("sum" if kind == "sum" else "after"), norm


def located(method: Any, site: Site, names: Names) -> tuple[Block, str, str]:
    """(block, sub-layer, scheme) of a bottleneck's position at a site: `place` backwards."""
    for block in names.blocks:
        for which, sub in block.subs.items():
            behind = names.normed_after(block, which)
            schemes = {}
            if site.key == sub.key:
                schemes = {"after": "output", "parallel" if behind else "residual": "parallel"}
                schemes |= {} if behind else {"sum": "sum"}
            elif behind and site.key == f"{sub.norm}:norm":
                schemes = {"sum": "sum", "after": "stream"}
            if method.position in schemes:
                return block, which, schemes[method.position]
    asked = f"an AdapterHub config for position={method.position!r} at {site.key}"
    do = "use self.attn or mlp, or the norms of a post-norm model; or keep graftwork's own format"
    raise GraftError(asked, "AdapterHub has no adapter there", do)


def widths(config: Config, names: Names, block: Block) -> int:
    """The bottleneck's width in a block."""
    given = config.take("reduction_factor", (int, float, dict), None)
    factor = given.get(str(block.index), given.get("default")) if isinstance(given, dict) else given
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not factor > 0:
        raise config.error(
            f"reduction_factor = {given!r}", "expected a number above 0, or one per layer with a 'default'"
        )
    return max(1, int(names.settings.hidden_size // factor))
