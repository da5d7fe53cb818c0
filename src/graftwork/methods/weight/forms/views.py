"""The support tensors of GLoRA at one weight: the largest kinds, and the others as views of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from graftwork.core.initial import xavier_uniform, zeros
from graftwork.core.weight import Weight

MATRIX = ("lora", "vector", "constant", "none")
KINDS = {"a": MATRIX, "b": MATRIX, "c": ("lora", "vector", "none"), "d": MATRIX[1:], "e": MATRIX[1:]}


class Choice(NamedTuple):
    """The kinds of A, B, C, D and E at one weight."""

    a: str
    b: str
    c: str
    d: str
    e: str


LARGEST = Choice("lora", "lora", "lora", "vector", "vector")


class Support(nn.ParameterDict):
    """a_up, b_up [*batch, out, r], a_down, b_down [*batch, r, in], c_up [*batch, in, r], c_down [*batch, r, 1], d, e [*batch, out],
    in the sizes of their kinds.
    """

    def fill(self, w: Weight, kinds: Choice, r: int, biased: bool) -> None:
        """New parameters of these kinds. biased: the host has a bias, which D multiplies."""
        for name, kind in kinds._asdict().items():
            rows, columns = (w.d_in, 1) if name == "c" else (w.d_out, w.d_in)
            if kind == "none" or (name == "d" and not biased):
                continue
            if name in "de":
                self[name] = w.vector(rows if kind == "vector" else 1, zeros)
                continue
            size = {"lora": (rows, r), "vector": (rows, 1), "constant": (1, 1)}[kind]
            self[f"{name}_up"] = w.parameter(*size, zeros)
            if kind == "lora":
                self[f"{name}_down"] = w.parameter(r, columns, xavier_uniform())

    def pair(self, name: str, kind: str, r: int | None = None) -> tuple[Tensor, Tensor | None] | None:
        """(up, down) whose product is A, B or C, of its first r ranks; down None: it is `up`, which broadcasts."""
        if kind == "none":
            return None
        up = self[f"{name}_up"]
        if kind == "lora":
            return up[..., :r], self[f"{name}_down"][..., :r, :]
        return (up[..., :1] if kind == "vector" else up[..., :1, :1]), None

    def matrix(self, name: str, kind: str, r: int | None = None) -> Tensor | None:
        """A, B [*batch, out, in] or C [*batch, in, 1], or what broadcasts to it."""
        pair = self.pair(name, kind, r)
        return None if pair is None else pair[0] if pair[1] is None else pair[0] @ pair[1]

    def vector(self, name: str, kind: str) -> Tensor | None:
        """D or E [*batch, out or 1]."""
        if kind == "none" or name not in self:
            return None
        return self[name] if kind == "vector" else self[name][..., :1]

    def used(self, kinds: Choice) -> dict[str, Tensor]:
        """The views that these kinds need, by the names of the parameters."""
        out: dict[str, Tensor | None] = {}
        for name, kind in kinds._asdict().items():
            if name in "de":
                out[name] = self.vector(name, kind)
            else:
                out[f"{name}_up"], out[f"{name}_down"] = self.pair(name, kind) or (None, None)
        return {name: t.detach() for name, t in out.items() if t is not None}
