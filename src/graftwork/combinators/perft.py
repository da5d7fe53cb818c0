"""PERFT: adapters beside, or inside of, the experts of a frozen mixture-of-experts layer.

Liu et al. 2024, "PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert Model", arXiv 2411.08212.
"""

from __future__ import annotations

from graftwork.core.errors import GraftError
from graftwork.core.method import Method, flatten, get, preset

from .mixture import Mixture


@preset("perft")
def PERFT(
    variant: str = "R",
    r: int = 16,
    experts: int = 4,
    top_k: int = 2,
    unit: str = "lora",
    alpha: float = 16.0,
    act: str = "silu",
    dropout: float = 0.0,
    balance: float = 0.01,
) -> list[Method]:
    """With y the output of the mixture-of-experts layer for h, and Delta_j(h) = (alpha / r) B A h, or U act(D h):

    variant: "R" y + sum_{j in top-K of M} q_j Delta_j(h),  q = softmax(G h) not renormalised, G [M, d] trained, N(0, 0.02^2)
        · "E" one Delta_i in each expert, with the frozen router's p (`perft_e`) · "D" y + sum_j Delta_j(h) · "S" y + Delta(h).
    r: rank or width.  experts, top_k: M and K, R(Top K/M); "D" is M adapters as one of M times the width, which is the same function.
    unit: "lora" or "adapter", both without biases.  balance: weight of M^2 mean_j(f_j P_j) over the own router alone ("R").
    In the vendored code of the paper "R" takes the backbone's p in the place of q; here it is the formula.
    Identity at init (B, U zero). Not mergeable.
    Parameters per layer: R 2 M d r + M d (without G for M = 1), E 2 N d r for N experts, D 2 M d r, S 2 d r.  Source: section 3.
    When: the backbone is itself a mixture of experts, and its routing shall be used or complemented.
    """
    if variant not in ("R", "E", "D", "S") or unit not in ("lora", "adapter"):
        asked = f"PERFT(variant={variant!r}, unit={unit!r})"
        raise GraftError(asked, "no such variant or unit", "choose 'R', 'E', 'D' or 'S', and 'lora' or 'adapter'")
    act, scale = ("none", alpha / r) if unit == "lora" else (act, 1.0)
    if variant == "E":
        return [*flatten(get("perft_e")(r=r, scale=scale, act=act, dropout=dropout))]
    width = r * experts if variant == "D" else r
    (of,) = flatten(
        get("bottleneck")(d=width, position="parallel", act=act, scale=scale, dropout=dropout, bias=False, at="mlp")
    )
    if variant != "R":
        return [of]
    return [Mixture(of=of, experts=experts, top_k=top_k, router="input", balance=balance)]
