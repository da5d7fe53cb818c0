"""Where a low-rank pair starts when it starts inside W: s B_0 A_0 is a part of W, taken out of it by a frozen second term.

w [*batch, out, in] in, (A_0 [*batch, r, in], B_0 [*batch, out, r]) out, at least in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graftwork.core.initial import Initial
from graftwork.core.site import Site

Pair = tuple[Tensor, Tensor]  # A_0, B_0


def principal(
    w: Tensor, r: int, scale: float, niter: int | None = None, generator: torch.Generator | None = None
) -> Pair:
    """The r largest singular triples, their values shared out: s B_0 A_0 is the best approximation of W of rank r.

    niter: None takes the exact decomposition; otherwise the subspace iterations of a randomised one, drawn from generator.
    Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, eq. 2 and 3; the randomised one is Halko, Martinsson and Tropp 2011.
    """
    if niter is None:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return shared_out(u[..., :r], s[..., :r], v[..., :r, :], scale)
    probes = torch.randn(w.shape[-1], min(2 * r, *w.shape[-2:]), generator=generator, dtype=w.dtype)
    q = torch.linalg.qr(w @ probes.to(w.device)).Q
    for _ in range(niter):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.mT @ q).Q).Q
    u, s, v = torch.linalg.svd(q.mT @ w, full_matrices=False)
    return shared_out(q @ u[..., :r], s[..., :r], v[..., :r, :], scale)


def minor(w: Tensor, r: int, scale: float) -> Pair:
    """The r smallest singular triples.  Source: Yu et al. 2025, "Ultra-Resolution Adaptation with Ease", section 3.2."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return shared_out(u[..., -r:], s[..., -r:], v[..., -r:, :], scale)


def orthonormal(w: Tensor, r: int) -> Pair:
    """The first r columns of Q and rows of R, W = Q R; s B_0 A_0 is s times their product.

    Source: Büyükakyüz 2024, "OLoRA", arXiv 2406.01775, section 3.
    """
    q, upper = torch.linalg.qr(w)
    return upper[..., :r, :], q[..., :r]


def shared_out(u: Tensor, s: Tensor, v: Tensor, scale: float) -> Pair:
    """A_0 = sqrt(s / scale) v and B_0 = u sqrt(s / scale), u [.., out, r], s [.., r], v [.., r, in]."""
    root = (s / scale).sqrt()
    return root[..., None] * v, u * root[..., None, :]


def gaussian_qr(rows: bool) -> Initial:
    """Orthonormal rows, or columns: the QR of a Gaussian. Leading axes are a batch of matrices."""

    def fill(t: Tensor, generator: torch.Generator | None) -> None:
        drawn = t.normal_(generator=generator)
        t.copy_(torch.linalg.qr(drawn.mT).Q.mT if rows else torch.linalg.qr(drawn).Q)

    return fill


def initials(site: Site, start: Callable[[Tensor, torch.Generator | None], Pair]) -> tuple[Initial, Initial]:
    """The initial values of A and B: what `start` makes of the site's weight, once, and only where values are drawn at all."""
    made: list[Tensor] = []

    def factor(i: int) -> Initial:
        def fill(t: Tensor, generator: torch.Generator | None) -> None:
            if not made:
                made.extend(start(weight_at(site), generator))
            t.copy_(made[i])

        return fill

    return factor(0), factor(1)


@torch.no_grad()
def weight_at(site: Site) -> Tensor:
    """The site's dense weight [*batch, out, in], at least in float32."""
    stored = site.module._parameters[site.weight.name]
    assert stored is not None
    dense = site.weight.dense(stored.detach())
    return dense.to(torch.promote_types(dense.dtype, torch.float32))
