"""What a family of AdapterHub's methods is here: which config and keys say what a list of methods and sites says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ...core.delta import Delta
from ...core.method import Method
from ...core.site import Site
from ..config import Config
from ..pieces import Slot
from .names import Names

Tensors = Mapping[str, Tensor]
Made = Sequence[tuple[Method, Sequence[Slot]]]


@dataclasses.dataclass(frozen=True)
class Held:
    """One method of an adapter at its sites, with the tensors of each and the shared ones."""

    method: Method
    sites: Sequence[Site]
    deltas: Mapping[str, Delta]
    tensors: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor]


class Family(Protocol):
    """The methods of one kind of config.

    reads, claims: whether it is the one for a config, and for a method.
    """

    def reads(self, config: Mapping[str, Any]) -> bool: ...

    def claims(self, method: Method) -> bool: ...

    def pieces(self, config: Config, names: Names, keys: set[str], warnings: list[str]) -> Made:
        """What a config says, for this backbone. keys: those of the file once unpacked, for what the config leaves open."""

    def config(self, held: Sequence[Held], names: Names) -> dict[str, Any]:
        """A config for these methods."""

    def plain(self, method: Method, site: Site) -> Method:
        """The method without what says nothing about a trained adapter: how it started, and other ways to say a width."""

    def moved(self, method: Method, site: Site, names: Names) -> tuple[Method, Site]:
        """The method and site that compute the same and that `pieces` would choose."""

    def unpack(self, config: Config, names: Names, tensors: dict[str, Tensor], warnings: list[str]) -> bool:
        """Replace, in place, tensors that are no slot's by those that are. False where the config no longer says what is there."""

    def pack(self, config: Config, names: Names, tensors: dict[str, Tensor]) -> None:
        """`unpack` undone, in place."""


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "swish": "silu",
    "silu": "silu",
    "leakyrelu": "leaky_relu",
    "tanh": "tanh",
    "linear": "none",
}


def activation(config: Config, default: str) -> str:
    """The non-linearity under its name here. GraftError for one that graftwork does not have."""
    name = config.take("non_linearity", str, default)
    if name.lower() not in ACTIVATIONS:
        raise config.error(f"non_linearity = {name!r}", f"graftwork has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]


def named_activation(act: str) -> str:
    """The name that AdapterHub has for a non-linearity of ours."""
    return next(there for there, here in ACTIVATIONS.items() if here == act and there != "silu")


def left_out(config: Config, names: Names) -> set[int]:
    """The blocks without an adapter. GraftError for a layer that the backbone does not have."""
    found = config.take("leave_out", list, [])
    if not all(type(i) is int for i in found):
        raise config.error(f"leave_out = {found!r}", "expected numbers of layers: restore the file")
    return set(found)
