"""A site: one place of a backbone where an adapter can be grafted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .weight import Weight, weight_of


@dataclass(eq=False)  # not frozen: a model has hundreds, and freezing doubles what each costs
class Site:
    """One place of the backbone, found by `anatomy`.

    path: dotted path of `module` in the model ("" is the model itself).
    role: q k v kv qkv o, up gate gate_up down, attn mlp block, embed, norm, head, lm_head, pooler, router, expert.*,
        linear, conv, any.
    tower: "encoder", "decoder", "vision"...; empty where there is one tower only.
    layer, depth: index of the repeated block in its tower, and how many blocks that tower has.
    param: the parameter the site stands for;  rows: its slice [a, b) of the dense [out, in] view (q inside a packed qkv);
        transposed: a bare parameter that is stored [.., in, out].
    cross: belongs to cross-attention.
    entry, exit: paths of the modules whose input and output are the sub-layer's input and output (before the residual
        add);  norm: path of the sub-layer's norm, whose input is the residual stream in a pre-norm block.
    unembed: path of the linear map that turns states into tokens (the LM head), for where a sequence is embedded.
    heads: number of attention heads of the site's output, where it is known.
    """

    path: str
    role: str
    module: nn.Module
    tower: str = ""
    layer: int | None = None
    depth: int = 0
    param: str = "weight"
    rows: tuple[int, int] | None = None
    transposed: bool = False
    cross: bool = False
    entry: str | None = None
    exit: str | None = None
    norm: str | None = None
    unembed: str | None = None
    heads: int | None = None
    width: int | None = None  # of the activation at the output, for sites that are not one weight
    dtype: torch.dtype | None = None  # of the activations, on a backbone whose weights are quantised

    @cached_property
    def key(self) -> str:
        """Unique in a model; the site's name on disk."""
        return f"{self.path}:{self.role}" + ("" if self.param == "weight" else f":{self.param}")

    @cached_property
    def weight(self) -> Weight:
        """The dense [out, in] view of the site's parameter. GraftError where it has none."""
        return weight_of(self.module, self.param, self.rows, self.transposed, self.dtype)

    @property
    def dense(self) -> Tensor:
        """The values of the weight now, [*batch, out, in]; without gradients."""
        stored = self.module._parameters[self.weight.name]
        assert stored is not None
        return self.weight.dense(stored.detach())

    @property
    def like(self) -> Tensor:
        """An empty tensor on the device of the module's first parameter, of its dtype or that of the activations."""
        first = next(self.module.parameters())
        return torch.empty(0, dtype=self.dtype or first.dtype, device=first.device)

    @property
    def entered(self) -> str | None:
        """Path of the module whose input a delta's `enter` edits."""
        return self.unembed or self.norm

    @property
    def d(self) -> int:
        """Width of the activation at the site's output."""
        return self.width if self.width is not None else self.weight.d_out
