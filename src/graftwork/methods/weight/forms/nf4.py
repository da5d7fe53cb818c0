"""NF4: four bits a number, whose sixteen levels are quantiles of the normal distribution, and doubly quantised block constants.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3; a plain reference in torch. The code book is
the published one (as in bitsandbytes); the 8-bit code of the block constants is a uniform one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 0.9677083  # the probability of the largest level before scaling


def levels() -> Tensor:
    """The sixteen levels q_k, rising, from -1 through an exact 0 to 1: eight positive normal quantiles, seven negative, over
    the largest."""
    upper = torch.special.ndtri(torch.linspace(LARGEST, 0.5, 9, dtype=torch.float64)[:8])
    lower = torch.special.ndtri(torch.linspace(LARGEST, 0.5, 8, dtype=torch.float64)[:7])
    every = torch.cat([-lower, upper.new_zeros(1), upper.flip(0)])
    return (every / every[-1]).float()


class NF4(nn.Module):
    """A tensor w of n numbers in 4.127 bits each: w = c[i // block] q[code_i], c = max |w| of its block.

    codes: uint8 [n / 2], two codes a byte, the first in the upper half.
    constants: c as int8 [n / block], c = mean + steps[j // block2] constants / 127 with one step (float32) for block2 of them
        and one mean; not `twice`, c itself in float32, and no steps.
    The last block of either kind may be short. Not stored with an adapter: made of the backbone's weight.
    """

    codes: Tensor
    constants: Tensor
    steps: Tensor
    mean: Tensor

    def __init__(self, w: Tensor, block: int = 64, block2: int = 256, twice: bool = True) -> None:
        super().__init__()
        self.shape, self.size, self.block, self.block2, self.twice = tuple(w.shape), w.numel(), block, block2, twice
        book = levels().to(w.device)
        blocks = _rows(w.detach().float(), block)
        c = blocks.abs().amax(-1)
        unit = blocks / torch.where(c > 0, c, 1.0)[:, None]
        index = torch.bucketize(unit, (book[1:] + book[:-1]) / 2, out_int32=True).to(torch.uint8).flatten()
        index = F.pad(index[: self.size], (0, self.size % 2))
        mean = c.mean() if twice else c.new_zeros(())
        rest = _rows(c - mean, block2)
        steps = rest.abs().amax(-1) if twice else c.new_zeros(0)
        if twice:
            eighth = (rest / torch.where(steps > 0, steps, 1.0)[:, None] * 127).round()
            c = eighth.to(torch.int8).flatten()[: len(c)]
        for name, value in (
            ("codes", index[::2] << 4 | index[1::2]),
            ("constants", c),
            ("steps", steps),
            ("mean", mean),
        ):
            self.register_buffer(name, value, persistent=False)

    def scales(self) -> Tensor:
        """c, one for each block, in float32."""
        if not self.twice:
            return self.constants.float()
        c = _rows(self.constants.float(), self.block2) * (self.steps.float()[:, None] / 127)
        return c.flatten()[: len(self.constants)] + self.mean.float()

    def dequantised(self) -> Tensor:
        """The tensor that the codes stand for, in its shape and float32."""
        book = levels().to(self.codes.device)
        pairs = torch.stack(torch.meshgrid(book, book, indexing="ij"), -1).view(256, 2)  # of every byte
        unit = pairs.index_select(0, self.codes.int()).flatten()[: self.size]
        return (_rows(unit, self.block) * self.scales()[:, None]).flatten()[: self.size].view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of all constants."""
        return sum(b.nbytes for b in self.buffers())


def _rows(flat: Tensor, size: int) -> Tensor:
    """Rows of `size` numbers, the last one filled with zeros."""
    flat = flat.reshape(-1)
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)
