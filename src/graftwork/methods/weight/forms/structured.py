"""Structured square matrices of full rank and few numbers, with their fast products: what `surm` is made of.

A circulant, a skew-circulant and a Toeplitz matrix all are M[i, j] = c[(i - j) mod L] for a vector c, their column, of
L >= n numbers; M x is then the first n numbers of a cyclic convolution of length L, by the real FFT.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graftwork.core.errors import GraftError
from graftwork.core.initial import kaiming_uniform, normal, parameter, zeros

KINDS = ("circulant", "toeplitz", "kronecker", "ldr")


def circulant(c: Tensor) -> Tensor:
    """The column of C[i, j] = c[(i - j) mod n]."""
    return c


def skew(h: Tensor) -> Tensor:
    """The column [2n] of S[i, j] = h[i - j] for i >= j, and -h[n + i - j] above."""
    return torch.cat([h, -h], -1)


def toeplitz(v: Tensor) -> Tensor:
    """The column [2n] of the symmetric T[i, j] = v[|i - j|]."""
    return torch.cat([v, torch.zeros_like(v[..., :1]), v[..., 1:].flip(-1)], -1)


def dense(column: Tensor, n: int) -> Tensor:
    """M [*batch, n, n] of a column [*batch, L]."""
    i = torch.arange(n, device=column.device)
    return column[..., (i[:, None] - i) % column.shape[-1]]


def product(column: Tensor, x: Tensor) -> Tensor:
    """M x for each x [..., n], in float32 at least."""
    size, wide = column.shape[-1], torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft(column.to(wide)) * torch.fft.rfft(x.to(wide), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., : x.shape[-1]]


def count(kind: str, d_in: int, d_out: int, k: int) -> int:
    """Numbers of a matrix."""
    return d_in + d_out if kind == "kronecker" else 2 * d_in * (k if kind == "ldr" else 1)


def check(kind: str, d_in: int, d_out: int, r: int, asked: str) -> None:
    """GraftError where there is no such matrix [d_out, d_in]."""
    found = f"a matrix of {d_out} x {d_in}"
    if kind == "kronecker" and (d_in % r or d_out % r):
        raise GraftError(asked, f"{found}, which r={r} does not divide", "choose r that divides both sizes")
    if kind != "kronecker" and d_in != d_out:
        do = "choose square ones (at='q, o'), or kind='kronecker'"
        raise GraftError(asked, f"{found}, and a {kind} matrix is square", do)


class Structured(nn.Module):
    """first, second: the two parts of M [*batch, d_out, d_in]; with the second zero, M is zero.

    circulant: M = Circ(first * second), both [n].  toeplitz: M = T(second) T(first), both [n].
    kronecker: M = kron(second, first), first [r, in / r], second [out / r, r].
    ldr: M = sum_i Circ(second_i) Skew(first_i), both [k, n].
    """

    def __init__(
        self, kind: str, d_in: int, d_out: int, r: int, k: int, like: Tensor | None, batch: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.kind, self.d_in, self.d_out, self.r = kind, d_in, d_out, r
        sizes = {"kronecker": ((r, d_in // r), (d_out // r, r)), "ldr": ((k, d_in),) * 2}.get(kind, ((d_in,),) * 2)
        self.first = parameter((*batch, *sizes[0]), kaiming_uniform() if kind == "kronecker" else normal(0.02), like)
        self.second = parameter((*batch, *sizes[1]), zeros, like)

    def matrix(self) -> Tensor:
        """M."""
        a, b, n = self.first, self.second, self.d_in
        if self.kind == "circulant":
            return dense(circulant(a * b), n)
        if self.kind == "toeplitz":
            return dense(toeplitz(b), n) @ dense(toeplitz(a), n)
        if self.kind == "ldr":
            return (dense(circulant(b), n) @ dense(skew(a), n)).sum(-3)
        blocks = b[..., :, None, :, None] * a[..., None, :, None, :]  # [out / r, r, r, in / r]
        return blocks.reshape(*a.shape[:-2], self.d_out, self.d_in)

    def forward(self, x: Tensor) -> Tensor:
        """M x for each x [..., in]; not for a batch of matrices."""
        a, b = self.first, self.second
        if self.kind == "circulant":
            return product(circulant(a * b), x)
        if self.kind == "toeplitz":
            return product(toeplitz(b), product(toeplitz(a), x))
        if self.kind == "ldr":
            return product(circulant(b), product(skew(a), x[..., None, :])).sum(-2)
        n = x.shape[:-1].numel()
        seen = torch.mm(x.reshape(n * self.r, -1), a.t().to(x.dtype)).view(n, self.r, self.r)
        return torch.bmm(b.to(seen.dtype).expand(n, -1, -1), seen).view(*x.shape[:-1], self.d_out)

    def work(self) -> int:
        """Multiply-adds of `forward` for one x: 5 / 2 L log2 L for a real transform of length L."""
        n = self.d_in
        if self.kind == "kronecker":
            return self.r * (self.d_in + self.d_out)
        short, long = (int(2.5 * length * math.log2(length + 1)) for length in (n, 2 * n))
        k = self.first.shape[-2] if self.kind == "ldr" else 1
        return {"circulant": 2 * short, "toeplitz": 4 * long, "ldr": long + k * (long + 2 * short)}[self.kind]
