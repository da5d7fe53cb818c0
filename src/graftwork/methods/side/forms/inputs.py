"""What a side block is called with besides its input: its positions, room in the cache, the side encoder's states."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.errors import GraftError

from .thin import config_of, thin_config

# arguments that one block makes for the next ones, in the order of its outputs behind the hidden states
CARRIED = ("position_bias", "encoder_decoder_position_bias")


class Memory(nn.Module):
    """The side encoder's last states: of this pass, or, where the encoder ran apart (generate), of its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}

    def of(self, encoded: Tensor, state: dict[Any, Any]) -> Tensor:
        """States [batch, seq, d/r] for the encoder's output [batch, seq, d], whose rows may be repeated (beams)."""
        if (self, "states") in state:
            return state[self, "states"]
        y, s = self.last if self.last is not None else (encoded[:0], encoded[:0])
        times = encoded.shape[0] // max(1, y.shape[0])
        if y.shape[0] and torch.equal(y.repeat_interleave(times, 0), encoded):
            return s.repeat_interleave(times, 0)
        raise GraftError(
            "a side decoder",
            "encoder states that its side encoder did not see last",
            "run the encoder with this adapter active",
        )


class Rotation:
    """Rotary positions (cos, sin) of the thin heads, by the rotary module that the model's own file defines."""

    def __init__(self, block: nn.Module, r: int) -> None:
        config = config_of(block)
        found = []
        for name, value in vars(sys.modules[type(block).__module__]).items():
            if name.endswith("RotaryEmbedding") and isinstance(value, type):
                found += [value] if "config" in inspect.signature(value).parameters else []
        self.made_by = found[0] if len(found) == 1 and config is not None else None
        self.config = thin_config(config, r) if self.made_by else None
        self.module: nn.Module | None = None

    def __call__(self, x: Tensor, position_ids: Tensor | None) -> Any:
        if self.made_by is None or position_ids is None:
            raise GraftError(
                "rotary positions of side blocks",
                "no single rotary module with a config and position ids",
                "use another model",
            )
        if self.module is None:
            self.module = self.made_by(config=self.config)
        return self.module.to(x.device)(x, position_ids)


def room_in(cache: Any, key: str, block: nn.Module) -> None:
    """A layer of the key-value cache for the side block `key`, behind those it has, made when they first meet."""
    writers: list[Any] = [m for m in block.modules() if getattr(m, "layer_idx", None) is not None]
    if not writers:
        return
    places = getattr(cache, "graft_layers", None)
    if places is None:
        places = cache.graft_layers = {}
    if key not in places:
        parts = [getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)]
        parts = [part for part in parts if part is not None]
        index = max([len(part.layers) for part in parts])
        for part in parts:
            kind = type(part.layers[0]) if part.layers else None
            if kind is None or kind.__name__ != "DynamicLayer":
                found = "no layers" if kind is None else f"layers of type {kind.__name__}"
                raise GraftError("a side network with this cache", found, "generate with the dynamic cache")
            while len(part.layers) <= index:
                part.layers.append(kind())
        places[key] = index
        if hasattr(cache, "is_updated"):
            cache.is_updated[index] = False
    for writer in writers:
        writer.layer_idx = places[key]
