"""Published ways to scale and to start LoRA, each under its own name: options of `lora`, not methods of their own."""

from __future__ import annotations

from graftwork.core.errors import GraftError
from graftwork.core.method import Method, preset

from .lora import LoRA


@preset("rslora")
def RSLoRA(r: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> list[Method]:
    """rsLoRA: W' = W + (alpha / sqrt(r)) B A, so that activations and gradients keep their size as r grows.

    r, alpha, dropout: of LoRA.  Parameters: r (in + out) per weight.  Source: Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2.
    When: ranks above about 32, where LoRA's alpha / r stops learning.
    """
    return [LoRA(r=r, alpha=alpha, dropout=dropout, rslora=True)]


@preset("pissa")
def PiSSA(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, niter: int | None = None) -> list[Method]:
    """PiSSA: LoRA that starts at the r largest singular triples of W, W' = W + s (B A - B_0 A_0), s = alpha / r.

    niter: None decomposes exactly; a number is that of the subspace iterations of a randomised decomposition (16 is usual).
    W is never rewritten. A file holds the plain LoRA [B, -B_0][A; A_0] of rank 2 r, of the same scale.
    Parameters: r (in + out) per weight.  Source: Meng et al. 2024, arXiv 2404.02948, eq. 2 and 3, appendix C.
    When: faster convergence than LoRA with the same file and serving; quantised backbones.
    """
    return [LoRA(r=r, alpha=alpha, dropout=dropout, init="pissa", niter=niter)]


@preset("olora")
def OLoRA(r: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> list[Method]:
    """OLoRA: LoRA that starts at the QR decomposition of W, B_0 = Q[:, :r], A_0 = R[:r], W' = W + s (B A - B_0 A_0).

    The term that it starts at is s Q_r R_r, s = alpha / r: the r leading columns of W, not its dominant directions.
    W is never rewritten. A file holds the plain LoRA [B, -B_0][A; A_0] of rank 2 r, of the same scale.
    Parameters: r (in + out) per weight.  Source: Büyükakyüz 2024, arXiv 2406.01775, section 3.
    When: a start that is dear neither in time nor in memory (one QR for each weight) and learns faster than LoRA's.
    """
    return [LoRA(r=r, alpha=alpha, dropout=dropout, init="olora")]


@preset("urae")
def URAE(r: int = 16, end: str = "last") -> list[Method]:
    """URAE: the r smallest singular triples of W are trained, W' = W + B A - B_0 A_0, at q, k, v and the output projection.

    end: "last" the smallest triples; "first" the largest, which is PiSSA.
    Of a guidance-distilled model, feed `gw.guidance(model, g)`, which is 1 in training and g in evaluation.
    Parameters: r (in + out) per weight.  Source: Yu et al. 2025, "Ultra-Resolution Adaptation with Ease", arXiv 2503.16322.
    When: diffusion models at resolutions with little data: minor components keep what the model knows.
    """
    if end not in ("last", "first"):
        raise GraftError(
            f"URAE(end={end!r})", "no end of a spectrum", "give 'last' (minor components) or 'first' (PiSSA)"
        )
    return [LoRA(r=r, alpha=float(r), init="minor" if end == "last" else "pissa", at="q, k, v, o")]
