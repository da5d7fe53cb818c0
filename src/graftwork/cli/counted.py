"""What a method trains on a model of the usual size, by its closed formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.errors import GraftError
from ..sites.anatomy import anatomy
from ..sites.where import select
from .docstring import cell


class Backbone:
    """A model of transformers at its default size, without memory."""

    def __init__(self, model: nn.Module) -> None:
        self.anatomy = anatomy(model)
        self.size = sum({id(p): p.numel() for p in model.parameters()}.values())
        self.title = f"{type(model).__name__}, {self.size / 1e6:,.0f} M"

    def counted(self, kinds: Sequence[Any]) -> str:
        """Parameters and their share of the backbone's, or why there are none."""
        total = 0
        try:
            for kind in kinds:
                sites = select(self.anatomy, kind.at or kind.of.at, kind.layers)
                total += sum(kind.count(site) for site in sites) + kind.count_shared(sites)
        except GraftError as error:
            return f"refused: {cell(error.found)[:120]} | "
        return f"{total:,} | {100 * total / self.size:.3f}%"
