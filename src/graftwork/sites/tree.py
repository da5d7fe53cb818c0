"""The module tree of a model with the few structural facts that `anatomy` asks of a module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..core.grafted import Graft
from . import lexicon


class Node:
    """A module at its first path. A module that is reached twice (shared layers) is one node.

    name, cls: its own name and that of its class, in lower case;  kind: "linear", "conv", "mha", "embed", "norm" or ""
    (anything else).
    """

    def __init__(self, path: str, module: nn.Module, parent: Node | None) -> None:
        self.path, self.module, self.parent = path, module, parent
        self.children: list[Node] = []
        self.name = path.rpartition(".")[2].lower()
        self.cls = type(module).__name__.lower()
        self.kind = kind(module)

    @cached_property
    def telling(self) -> str:
        """The name that says what a leaf is: its own, or that of the module above where its own says nothing."""
        parts = self.path.lower().split(".")
        index = len(parts) - 1
        while index > 0 and parts[index] in lexicon.GENERIC and not parts[index - 1].isdigit():
            index -= 1
        return parts[index]

    @cached_property
    def below(self) -> list[Node]:
        """This node and everything under it, in the order of definition. Complete once the tree is grown."""
        return [self, *(node for child in self.children for node in child.below)]

    @cached_property
    def weighty(self) -> list[Node]:
        """The linear-like leaves, convolutions and packed attentions at or under this node."""
        return [node for node in self.below if node.kind in ("linear", "conv", "mha")]

    def up(self) -> Iterator[Node]:
        """The ancestors, nearest first."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    def under(self, other: Node) -> bool:
        return self is other or not other.path or self.path.startswith(other.path + ".")

    def speaks_of(self, pattern: re.Pattern[str]) -> bool:
        """True where the node's own name or its class matches."""
        return bool(pattern.search(self.name) or pattern.search(self.cls))


def tree(model: nn.Module) -> Node:
    """The tree of `model`; the root has the path "". What graftwork itself put into the model is left out."""
    seen: set[int] = set()

    def grow(path: str, module: nn.Module, parent: Node | None) -> Node:
        seen.add(id(module))
        node = Node(path, module, parent)
        for name, child in module.named_children():
            if id(child) not in seen and not isinstance(child, Graft):
                node.children.append(grow(f"{path}.{name}" if path else name, child, node))
        return node

    return grow("", model, None)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the module holds itself."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def kind(module: nn.Module) -> str:
    """What a module is, from its class and its parameters, never from its place."""
    if isinstance(module, nn.MultiheadAttention):
        return "mha"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embed"
    weight = module._parameters.get("weight")
    kin = [cls.__name__.lower() for cls in type(module).__mro__[:-2]]
    if weight is None:
        # A quantised linear layer may keep its weight elsewhere (a buffer, a packed tensor).
        return "linear" if hasattr(module, "in_features") and any("linear" in name for name in kin) else ""
    if weight.ndim == 1 and (any("norm" in name for name in kin) or not module._modules):
        return "norm"
    if weight.ndim == 2 and (stored_in_out(module) or any("linear" in name for name in kin)):
        return "linear"
    if weight.ndim == 2 and any("embedding" in name for name in kin):
        return "embed"
    return ""


def stored_in_out(module: nn.Module) -> bool:
    """True for transformers' Conv1D, which stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def dims(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear-like layer or convolution; d_in counts the channels of one position."""
    if isinstance(module, _ConvNd):
        return module.out_channels, module.in_channels
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    if not stored_in_out(module) and hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = module._parameters["weight"]
    assert weight is not None
    rows, columns = weight.shape
    return (columns, rows) if stored_in_out(module) else (rows, columns)


def norm_width(norm: Node) -> int:
    """The number of scales of a norm."""
    weight = norm.module._parameters["weight"]
    assert weight is not None
    return int(weight.shape[0])
