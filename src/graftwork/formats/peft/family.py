"""What a family of PEFT's methods is here: which config and keys say what a list of methods and sites says."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from ...core.method import Method
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece

PREFIX = "base_model.model."  # of every path in a file: PEFT's own two modules around the model


class Family(Protocol):
    """The methods of one `peft_type`.

    claims: whether it is the one for an adapter with this method.
    """

    peft_type: str

    def claims(self, method: Method) -> bool: ...

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        """What a config says, for this backbone. keys: those of the file, for what the config leaves open."""

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        """A config for these methods with their tensors by spot."""
