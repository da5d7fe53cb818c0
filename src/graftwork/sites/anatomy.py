"""Anatomy: what the parts of a model are. Role -> modules, for any model, from names checked against structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.quantised import activation_dtype
from ..core.site import Site
from . import lexicon
from .blocks import Tower, rename, towers
from .entries import embeddings, entries, tops
from .projections import find_attention, heads_of
from .regions import norm_of, regions
from .sublayers import Part, SubLayer, find_experts, find_mlps
from .tree import Node, dims, norm_width, own_parameters, tree


@dataclass(frozen=True)
class Anatomy:
    """The sites of a model, by module order within each role. name: the model's class."""

    name: str
    sites: tuple[Site, ...]
    paths: tuple[str, ...]

    def of(self, role: str) -> list[Site]:
        """The sites of a role; those of MLA's low-rank pairs ("kv") answer to "k" and "v" too."""
        return [site for site in self.sites if site.role == role or (site.role == "kv" and role in ("k", "v"))]

    @property
    def roles(self) -> list[str]:
        return list(dict.fromkeys(site.role for site in self.sites))

    @property
    def towers(self) -> list[str]:
        return [name for name in dict.fromkeys(site.tower for site in self.sites) if name]

    def rows(self) -> list[dict[str, Any]]:
        """One row per role and tower: how many sites, an example path, the shapes (for the command line)."""
        groups: dict[tuple[str, str, bool], list[Site]] = {}
        for site in self.sites:
            groups.setdefault((site.tower, site.role, site.cross), []).append(site)
        return [
            {
                "tower": tower,
                "role": role,
                "cross": cross,
                "sites": len(sites),
                "layers": sites[0].depth,
                "example": sites[0].path + ("" if sites[0].param == "weight" else f".{sites[0].param}"),
            }
            for (tower, role, cross), sites in groups.items()
        ]


def anatomy(model: nn.Module) -> Anatomy:
    """Find the sites of `model`. Reads names and shapes only: the model may be on the meta device."""
    reader = _Reader(model)
    return Anatomy(type(model).__name__, tuple(reader.read()), reader.paths)


class _Reader:
    """One reading of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.root = tree(model)
        self.paths = tuple(node.path for node in self.root.below)
        self.config, self.dtype = getattr(model, "config", None), activation_dtype(model)
        self.towers = towers(self.root)
        holders = {id(block) for tower in self.towers for block in tower.blocks if len(tower.blocks) > 1}
        self.regions = regions(self.root, holders)
        body = [t for t in self.towers if self.regions[id(t.blocks[0])] == "body"]
        if body and len(body) < len(self.towers):
            self.towers = rename(body)
        self.inside: dict[int, tuple[Tower, int]] = {}
        self.sites: dict[str, Site] = {}

    def read(self) -> list[Site]:
        for tower in self.towers:
            for index, block in enumerate(tower.blocks):
                self.inside.update((id(node), (tower, index)) for node in block.below)
        for tower in self.towers:
            for index, block in enumerate(tower.blocks):
                self.block(block, tower, index)
        if self.towers:
            self.outside()
        else:
            self.plain()
        self.everywhere()
        for site in [*entries(self.root, self.sites.values()), *tops(self.sites.values(), self.paths)]:
            self.put(site)
        for site in embeddings(self.root, self.sites.values()):
            self.put(site)
        return list(self.sites.values())

    # -- one block -------------------------------------
    def block(self, block: Node, tower: Tower, index: int) -> None:
        hidden, place = _hidden(block), (tower, index)
        experts = find_experts(block, hidden)
        apart = experts.taken
        attentions = find_attention(block, apart)
        taken = apart | {id(part.node) for sub in attentions for part in sub.parts}
        mlps = find_mlps(block, taken | _of_attention(attentions, block))
        for sub in attentions:
            self.sublayer(sub, block, place)
        for sub in mlps:
            residual = sub.width == sub.d_in or sub.width in hidden
            mixed = any(sub.node.under(mixture) for mixture in experts.mixtures)
            within = any(n.speaks_of(lexicon.ATTENTION) for n in sub.node.up() if n.under(block) and n is not block)
            if residual or not within:  # else a position bias inside an attention
                self.sublayer(sub, block, place, whole=residual and not mixed)
        width = next((s.width for s in [*attentions, *mlps] if s.width), None)
        for mixture in experts.mixtures:
            whole = SubLayer("mlp", mixture, [], mixture, mixture, width=width or next(iter(sorted(hidden)), None))
            self.sublayer(whole, block, place)
        for part in experts.parts + experts.routers:
            self.add(part, place)
        leaves = [leaf for leaf in block.weighty if id(leaf) not in apart]
        for leaf in leaves:
            for part in _packs(leaf) if leaf.kind == "mha" else [Part(leaf, leaf.kind)]:
                self.add(part, place)
        last = next((s.width for s in [*mlps[::-1], *attentions[::-1]] if s.width and s.width in hidden), width)
        plain = dims(leaves[-1].module)[0] if leaves else None
        self.put(
            Site(
                block.path,
                "block",
                block.module,
                tower.name,
                index,
                len(tower.blocks),
                entry=block.path,
                exit=block.path,
                width=last or plain,
            )
        )

    def sublayer(self, sub: SubLayer, block: Node, place: tuple[Tower, int] | None, whole: bool = True) -> None:
        norm = norm_of(sub, block)
        heads = self.heads(sub)
        for part in sub.parts:
            self.add(
                part,
                place,
                cross=sub.cross,
                heads=heads_of(part, sub, heads),
                norm=norm.path if norm else None,
            )
        if whole:
            tower, layer, depth = _place(place)
            assert sub.entry is not None and sub.exit is not None
            self.put(
                Site(
                    sub.node.path,
                    sub.role,
                    sub.node.module,
                    tower,
                    layer,
                    depth,
                    cross=sub.cross,
                    entry=sub.entry.path,
                    exit=sub.exit.path,
                    norm=norm.path if norm else None,
                    heads=heads if sub.role == "attn" else None,
                    width=sub.width,
                )
            )

    def heads(self, sub: SubLayer) -> int | None:
        """Number of query heads, from the module or the config, where it divides the projection."""
        if sub.role != "attn" or sub.heads:
            return sub.heads
        queries = [p for p in sub.of("q") if p.rows is None]
        outputs = sub.of("o")
        size = dims(outputs[0].node.module)[1] if outputs else dims(queries[-1].node.module)[0] if queries else 0
        above = [p.node.parent for p in sub.parts if p.node.parent]
        modules = [n.module for n in dict.fromkeys([sub.node, *above])]
        for holder in [*modules, *(getattr(m, "config", None) for m in modules), self.config]:
            for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "attention_heads"):
                value = getattr(holder, name, None)
                if isinstance(value, int) and value > 0 and size and size % value == 0:
                    return value
        return None

    # -- outside of blocks -------------------------------------
    def outside(self) -> None:
        """Attention and feed-forwards that stand alone (resamplers, projectors)."""
        skip = {id(n) for n in self.root.below if id(n) in self.inside or self.regions[id(n)] != "body"}
        attentions = find_attention(self.root, skip)
        taken = skip | {id(part.node) for sub in attentions for part in sub.parts}
        for sub in attentions + find_mlps(self.root, taken | _of_attention(attentions, self.root), strict=True):
            self.sublayer(sub, self.root, self.near(sub.node), whole=sub.width == sub.d_in)

    def near(self, node: Node) -> tuple[Tower, int] | None:
        """The tower around a node that is in no block."""
        roots = [(t.root.rpartition(".")[0], t) for t in self.towers]
        fits = [(root, t) for root, t in roots if not root or node.path.startswith(root + ".")]
        return (max(fits, key=lambda fit: len(fit[0]))[1], -1) if fits else None

    def plain(self) -> None:
        """A model without repeated blocks: every Linear and Conv is a site; the last Linear, if it is not the only one, is the head."""
        bodies = [n for n in self.root.weighty if self.regions[id(n)] == "body"]
        skip = {id(n) for n in self.root.below if self.regions[id(n)] != "body"}
        for sub in find_attention(self.root, skip):
            self.sublayer(sub, self.root, None)
        linears = [n for n in bodies if n.kind == "linear" and not any(up.kind == "mha" for up in n.up())]
        if linears and len(bodies) > 1 and not any(where != "body" for where in self.regions.values()):
            self.regions[id(linears[-1])] = "head"
        for leaf in bodies:
            if self.regions[id(leaf)] == "body":
                for part in _packs(leaf) if leaf.kind == "mha" else [Part(leaf, leaf.kind)]:
                    self.add(part, None)

    # -- roles that hold everywhere -------------------------------------
    def everywhere(self) -> None:
        # a table outside of every tower that only keeps the weight of theirs (T5's `shared`) is never called
        tables = [node for node in self.root.below if node.kind == "embed"]
        called = {id(node.module._parameters["weight"]) for node in tables if self.near(node)}
        for node in self.root.below:
            if not own_parameters(node.module) and node.kind != "linear":
                continue
            if node in tables and not self.near(node) and id(node.module._parameters["weight"]) in called:
                continue
            where, place = self.regions[id(node)], self.inside.get(id(node)) or self.near(node)
            if where != "body":
                self.add(Part(node, where), place)
                continue
            self.add(Part(node, "any"), place)
            if node.kind == "norm":
                self.add(Part(node, "norm"), place)
            elif id(node) not in self.inside and (node.kind == "embed" or (node.kind == "conv" and _is_patch(node))):
                self.add(Part(node, "embed"), place)

    def add(
        self,
        part: Part,
        place: tuple[Tower, int] | None,
        cross: bool = False,
        heads: int | None = None,
        norm: str | None = None,
    ) -> None:
        tower, layer, depth = _place(place)
        transposed = part.transposed
        self.put(
            Site(
                part.node.path,
                part.role,
                part.node.module,
                tower,
                layer,
                depth,
                part.param,
                part.rows,
                transposed,
                cross,
                norm=norm,
                heads=heads,
            )
        )

    def put(self, site: Site) -> None:
        site.dtype = self.dtype
        self.sites.setdefault(site.key, site)


def _place(place: tuple[Tower, int] | None) -> tuple[str, int | None, int]:
    if place is None:
        return "", None, 0
    tower, index = place
    return tower.name, index if index >= 0 else None, len(tower.blocks)


def _packs(node: Node) -> list[Part]:
    """The whole weights that a torch.nn.MultiheadAttention keeps itself, as parts of role "linear"."""
    names = ["in_proj_weight"] if node.module._parameters.get("in_proj_weight") is not None else []
    return [Part(node, "linear", name) for name in names or [f"{role}_proj_weight" for role in "qkv"]]


def _of_attention(subs: list[SubLayer], block: Node) -> set[int]:
    """Ids of what stands in an attention module but not in a feed-forward inside of it."""
    return {
        id(n)
        for sub in subs
        if sub.node is not block
        for n in sub.node.below
        if not any(up.speaks_of(lexicon.MLP) for up in [n, *n.up()] if up.under(sub.node) and up is not sub.node)
    }


def _hidden(block: Node) -> set[int]:
    """Widths that the block's norms speak of: the residual stream is among them."""
    own = {norm_width(n) for n in block.children if n.kind == "norm"}
    return own or {norm_width(n) for n in block.below if n.kind == "norm"}


def _is_patch(node: Node) -> bool:  # a positional convolution under a weight norm has no weight of its own, and is none
    return "weight" in node.module._parameters and any(word in node.path.lower() for word in ("embed", "patch"))
