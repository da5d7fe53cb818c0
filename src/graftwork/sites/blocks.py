"""Finding the repeated blocks of a model and the towers they stand in.

A series is a ModuleList, a Sequential, or a set of numbered containers. Its members are blocks where they repeat; where
the members are only stages that hold repeated blocks themselves (Swin, ResNet, ALBERT's layer groups), those are.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from . import lexicon
from .tree import Node


@dataclass(eq=False)
class Tower:
    """Blocks that follow each other. name: "" where the model has one tower only."""

    name: str
    root: str
    blocks: list[Node] = field(default_factory=list)


def series(node: Node) -> list[Node]:
    """The members of a series held by `node`; empty where it holds none."""
    if not node.children or (node.parent is not None and node.speaks_of(lexicon.EXPERT)):
        return []
    if isinstance(node.module, (nn.ModuleList, nn.Sequential)):
        return [child for child in node.children if child.children]
    if isinstance(node.module, nn.ModuleDict):
        members = [child for child in node.children if child.children]
        return members if len({type(m.module) for m in members}) == 1 and len(members) > 1 else []
    numbered: dict[str, list[Node]] = {}
    for child in node.children:
        held = isinstance(child.module, (nn.ModuleList, nn.Sequential))
        if held and (match := re.fullmatch(r"(.*?)_?\d+", child.name)):
            numbered.setdefault(match[1], []).append(child)
    longest = max(numbered.values(), key=len, default=[])
    return longest if len(longest) > 1 else []


def attention_marks(node: Node) -> list[Node]:
    """Leaves whose name is that of a query or packed projection, and packed attention modules."""
    words = lexicon.Q | lexicon.QKV
    return [leaf for leaf in node.weighty if leaf.kind == "mha" or leaf.telling in words]


def _covers(blocks: list[Node], member: Node) -> bool:
    """True where one inner series holds what makes a block of `member`, so that `member` is only a stage."""
    held = {id(leaf) for block in blocks if len(block.weighty) > 1 for leaf in block.weighty}
    leaves = member.weighty
    attention = attention_marks(member)
    forward = [leaf for leaf in leaves if any(n.speaks_of(lexicon.MLP) for n in [leaf, *leaf.up()] if n.under(member))]
    if not held or any(id(leaf) not in held for leaf in attention):
        return False
    return all(2 * sum(id(leaf) in held for leaf in group) >= len(group) for group in (leaves, forward))


def _repeats(members: list[Node]) -> bool:
    return len(members) == 1 or max(Counter(type(m.module) for m in members).values()) > 1


def find(node: Node, inside: bool = False) -> list[list[Node]]:
    """All series of repeated blocks at or under `node`, as lists of member nodes, in order."""
    members = [m for m in series(node) if m.weighty]
    below: dict[int, list[list[Node]]] = {id(child): find(child, inside or bool(members)) for child in node.children}
    flat = [blocks for child in node.children for blocks in below[id(child)]]
    if not members:
        return flat
    staged = [m for m in members if any(_covers(blocks, m) for blocks in below[id(m)])]
    if len(staged) * 2 >= len(members):
        return flat
    others = [blocks for child in node.children if child not in members for blocks in below[id(child)]]
    solid = [m for m in members if len(m.weighty) > 1]
    if _repeats(members) and (solid or len(members) > 1):
        return [members, *others]
    if flat:
        return flat
    if not inside and isinstance(node.module, nn.ModuleList) and len(solid) > 1:
        return [members]
    return []


def _names(path: str) -> tuple[str, str]:
    """(modality, side) that the components of a path speak of; empty where they say nothing."""
    modality = side = ""
    for part in path.lower().split("."):
        modality = modality or next((name for name, words in lexicon.MODALITY.items() if part in words), "")
        side = next((name for name, pattern in lexicon.SIDE.items() if pattern.search(part)), side)
    return modality, side


def _root(path: str) -> str:
    """The path of a series without its numbered tail: "encoder.layers.0.blocks" and "...1.blocks" share a root."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if re.fullmatch(r".*\d+", part):
            return ".".join(parts[:index])
    return ".".join(parts[:-1]) if len(parts) > 1 else path


def towers(root: Node) -> list[Tower]:
    """The towers of a model, each with its blocks in order."""
    found: dict[str, Tower] = {}
    for blocks in find(root):
        if blocks:
            place = blocks[0].path.rpartition(".")[0]
            place = _root(place) if re.search(r"\d", place) else place
            found.setdefault(place, Tower("", place)).blocks += blocks
    result = list(found.values())
    # Lists of single layers with a norm (patch embeddings, projections) are towers only where nothing else is.
    strong = [tower for tower in result if any(len(block.weighty) > 1 for block in tower.blocks)]
    return rename(strong or result)


def rename(found: list[Tower]) -> list[Tower]:
    """Give each of several towers a name of its own: modality or side, both where one is not enough, else the path."""
    if len(found) == 1:
        found[0].name = ""
        return found
    speaks = {id(tower): _names(tower.root) for tower in found}
    short = Counter(modality or side for modality, side in speaks.values())
    for tower in found:
        modality, side = speaks[id(tower)]
        name = modality or side
        tower.name = f"{modality}_{side}" if short[name] > 1 and modality and side else name or tower.root.split(".")[0]
    for shorten in (True, False):  # by the telling parts of the path, and by all of it where that is not enough
        for name, count in Counter(tower.name for tower in found).items():
            for tower in (t for t in found if t.name == name and count > 1):
                parts = tower.root.split(".")
                telling = [part for part in parts if part not in lexicon.CONTAINERS]
                tower.name = "_".join((telling or parts) if shorten else parts)
    return found
