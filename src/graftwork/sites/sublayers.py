"""A sub-layer of a block, and the feed-forward kind (up, gate, down) and experts.

Names propose, structure decides: a `down` must take what its `up` gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import lexicon
from .tree import Node, dims, own_parameters


@dataclass(eq=False)
class Part:
    """One weight with a role: a leaf module, a bare parameter, or rows of a packed weight."""

    node: Node
    role: str
    param: str = "weight"
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(eq=False)
class SubLayer:
    """Attention or feed-forward. node: the smallest module that holds it; width: of its output; d_in: of its input."""

    role: str
    node: Node
    parts: list[Part] = field(default_factory=list)
    entry: Node | None = None
    exit: Node | None = None
    cross: bool = False
    heads: int | None = None
    width: int | None = None
    d_in: int | None = None

    def of(self, *roles: str) -> list[Part]:
        return [part for part in self.parts if part.role in roles]


def owner(leaf: Node) -> Node:
    """The module a named leaf belongs to: its parent, or above a wrapper such as `q_proj.linear`."""
    node, name = leaf, leaf.telling
    while node.parent is not None and node.name != name:
        node = node.parent
    return node.parent or node


def common(nodes: Iterable[Node]) -> Node:
    """The smallest module that holds all nodes."""
    node, *rest = nodes
    while node.parent is not None and not all(other.under(node) for other in rest):
        node = node.parent
    return node


def leaving(leaf: Node) -> Node:
    """The module whose output is the sub-layer's output: the last projection, or the dropout right behind it."""
    home = leaf.parent
    if home is None:
        return leaf
    drops = [child for child in home.children if isinstance(child.module, nn.Dropout)]
    for drop in drops:
        if drop.name in ("resid_dropout", "output_dropout"):
            return drop
    if len(drops) == 1 and ("output" in home.cls or "output" in home.name):
        return drops[0]
    return leaf


# -- feed-forward ----------------------------------------------------------------------------------------------
_ROLES = (("gate_up", lexicon.GATE_UP), ("gate", lexicon.GATE), ("up", lexicon.UP), ("down", lexicon.DOWN))


def mlp_role(leaf: Node) -> str:
    """The proposed role of a leaf in a feed-forward; empty where its name says nothing."""
    name = leaf.telling
    return next((role for role, words in _ROLES if name in words), "")


def find_mlps(block: Node, taken: set[int], strict: bool = False) -> list[SubLayer]:
    """The feed-forward sub-layers at or under `block`, of leaves that are not `taken`, innermost modules first.

    strict: only what calls itself a feed-forward counts (outside of repeated blocks).
    """
    result: list[SubLayer] = []
    used = set(taken)
    nodes = sorted((n for n in block.below if n.children), key=lambda n: -n.path.count("."))
    for node in nodes:
        called = node.speaks_of(lexicon.MLP)
        if strict and not called and not any(n.speaks_of(lexicon.MLP) for n in node.up() if n.under(block)):
            continue
        while True:
            leaves = [n for n in node.weighty if id(n) not in used and n.kind in ("linear", "conv")]
            sub = _pair(leaves) or (_perceptron(leaves) if called else None)
            if sub is None:
                break
            result.append(sub)
            used |= {id(part.node) for part in sub.parts}
    return result


def _pair(leaves: list[Node]) -> SubLayer | None:
    """A feed-forward made of an up (and a gate) and a down among `leaves`, by names and fitting shapes."""
    proposed = [(leaf, mlp_role(leaf)) for leaf in leaves]
    for down in (leaf for leaf, role in proposed if role == "down"):
        out, inner = dims(down.module)
        ups = [leaf for leaf, role in proposed if role in ("up", "gate", "gate_up") or _twin(leaf, proposed)]
        fits = [u for u in ups if dims(u.module)[1] == out and dims(u.module)[0] in (inner, 2 * inner)]
        fits = [u for u in fits if u is not down and u.parent is fits[0].parent]
        if fits:
            return _feed_forward(fits, down)
    return None


def _perceptron(leaves: list[Node]) -> SubLayer | None:
    """The two to four layers of a module that calls itself a feed-forward, whatever they are called.

    Its input and output may differ in width (a projector between two towers).
    """
    dense = [n for n in leaves if n.kind == "linear" or _pointwise(n.module)] or leaves
    if not 2 <= len(dense) <= 4:
        return None
    rank = {"gate": 0, "up": 0, "gate_up": 0, "down": 2}
    dense = sorted(dense, key=lambda leaf: rank.get(mlp_role(leaf), 1))  # an input and an output may come first
    *ups, down = dense
    inner = dims(down.module)[1]
    if len(ups) == 2 and _same_shape(ups) and dims(ups[0].module)[0] == inner and mlp_role(ups[0]) == "gate":
        return _feed_forward(ups, down)
    widths = [dims(leaf.module) for leaf in dense]
    if all(before[0] in (after[1], 2 * after[1]) for before, after in pairwise(widths)):
        return _feed_forward(ups[:1], down)
    return None


def _pointwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and set(module.kernel_size) == {1}


def _twin(leaf: Node, proposed: list[tuple[Node, str]]) -> bool:
    """Does a leaf without a telling name stand beside an up of the same parent and shape (w_0 and w_1)?"""
    ups = [other for other, role in proposed if role == "up" and other is not leaf]
    return any(other.parent is leaf.parent and _same_shape([leaf, other]) for other in ups)


def _same_shape(leaves: list[Node]) -> bool:
    return len({dims(leaf.module) for leaf in leaves}) == 1 and len(leaves) > 1


def _feed_forward(ups: list[Node], down: Node) -> SubLayer:
    (out, inner), d_in = dims(down.module), dims(ups[0].module)[1]
    node = common([down, *ups])
    sub = SubLayer("mlp", node, [Part(down, "down")], ups[0], leaving(down), width=out, d_in=d_in)
    named = {mlp_role(leaf) for leaf in ups}
    for index, leaf in enumerate(ups):
        role = mlp_role(leaf)
        if dims(leaf.module)[0] == 2 * inner:
            role = "gate_up"
        elif len(ups) == 1:
            role = "up"
        elif not (role in ("up", "gate") and named >= {"up", "gate"}):
            role = "gate" if index == 0 else "up"
        sub.parts.append(Part(leaf, role))
    return sub


# -- experts -------------------------------------
@dataclass(eq=False)
class Experts:
    """What a block has of experts. mixtures: the modules that hold a router and experts."""

    parts: list[Part] = field(default_factory=list)
    routers: list[Part] = field(default_factory=list)
    mixtures: list[Node] = field(default_factory=list)

    @property
    def taken(self) -> set[int]:
        return {id(part.node) for part in self.parts + self.routers}


def find_experts(block: Node, hidden: set[int]) -> Experts:
    """The experts of a block, as lists of feed-forwards or as parameters [E, ., .].

    hidden: widths of the residual stream, which tell square parameters apart.
    """
    found = Experts()
    for node in block.below:
        bare = {name: p for name, p in own_parameters(node.module).items() if p.ndim == 3 and "bias" not in name}
        many = isinstance(node.module, (nn.ModuleList, nn.ModuleDict)) and node.name.endswith("experts")
        if bare and node.speaks_of(lexicon.EXPERT):
            parts = _bare_experts(node, bare, hidden)
        elif many and "shared" not in node.name:
            subs = [sub for expert in node.children for sub in find_mlps(expert, set())]
            parts = [Part(part.node, f"expert.{part.role}") for sub in subs for part in sub.parts]
        else:
            continue
        if any(n.speaks_of(lexicon.ATTENTION) for n in _between(node, block)):
            # A mixture of attention experts: the first weight makes queries, the last one is the output.
            renamed = {"expert.up": "q", "expert.gate_up": "q", "expert.down": "o"}
            found.parts += [replace(part, role=renamed.get(part.role, part.role)) for part in parts]
            continue
        found.parts += parts
        if not parts or node.parent is None:
            continue
        holder = node.parent if node is not block and node.parent is not block else node
        found.mixtures += [holder] if holder not in found.mixtures else []
        for gate in (c for c in node.parent.children if c.name in lexicon.ROUTERS or "router" in c.name):
            found.routers += [Part(n, "router") for n in gate.below if _is_matrix(n) and not _is_ordinary_gate(n)]
    return found


def _between(node: Node, block: Node) -> list[Node]:
    return [n for n in [node, *node.up()] if n.under(block) and n is not block]


def _is_matrix(node: Node) -> bool:
    return node.kind in ("linear", "") and any(p.ndim == 2 for p in own_parameters(node.module).values())


def _is_ordinary_gate(node: Node) -> bool:
    """`gate` of a plain gated feed-forward beside an `up` of the same shape."""
    beside = node.parent.children if node.parent else []
    return node.kind == "linear" and any(
        mlp_role(c) == "up" and c.kind == "linear" and dims(c.module) == dims(node.module) for c in beside
    )


def _bare_experts(node: Node, bare: dict[str, nn.Parameter], hidden: set[int]) -> list[Part]:
    """Experts stored as parameters [E, out, in] or [E, in, out]: whichever way up and down fit each other."""
    roles = {}
    for name in bare:
        word = name.lower().removesuffix("_weight").removesuffix(".weight")
        word = node.telling if word == "weight" else word
        role = next((role for role, words in _ROLES if word in words), "")
        if role:
            roles[name] = role
    up = next((bare[n] for n, role in roles.items() if role in ("gate_up", "up")), None)
    down = next((bare[n] for n, role in roles.items() if role == "down"), None)
    transposed = _transposed(up, down, hidden, getattr(node.module, "is_transposed", None))
    return [Part(node, f"expert.{role}", name, None, transposed) for name, role in roles.items()]


def _transposed(up: nn.Parameter | None, down: nn.Parameter | None, hidden: set[int], declared: bool | None) -> bool:
    if up is not None and down is not None:
        fits = [_chains(up.shape[1:][::step], down.shape[1:][::step]) for step in (1, -1)]
        if fits[0] != fits[1]:
            return fits[1]
    if declared is not None:
        return bool(declared)
    if up is not None and (up.shape[2] in hidden) != (up.shape[1] in hidden):
        return up.shape[1] in hidden
    if down is not None and (down.shape[2] in hidden) != (down.shape[1] in hidden):
        return down.shape[2] in hidden
    return False


def _chains(up: Sequence[int], down: Sequence[int]) -> bool:
    """Does `down` (out, in) take what `up` (out, in) gives, gated or not, and give what `up` takes?"""
    return up[1] == down[0] and up[0] in (down[1], 2 * down[1])
