"""MoLA: a mixture of LoRA experts at every linear layer, with more experts the higher the layer.

Gao et al. 2024, "Higher Layers Need More LoRA Experts", arXiv 2402.08562, and GCYZSL/MoLA.
"""

from __future__ import annotations

from graftwork.core.method import Method, flatten, get, preset

from .mixture import Mixture


@preset("mola")
def MoLA(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.05,
    top_k: int = 2,
    experts: int | tuple[int, ...] = (2, 4, 6, 8),
    balance: float = 1e-3,
) -> list[Method]:
    """y = W x + (alpha / r) sum_{e in S} w_e B_e A_e x,  w_e = p_e / sum_{j in S} p_j,  p = softmax(R x), S its k largest.

    experts: N_l, spread over the depth: (2, 4, 6, 8) the triangle, (8, 6, 4, 2) inverted, (8, 2, 2, 8) the hourglass, 5 everywhere.
        Every weight has an R of its own.
    top_k: k.  balance: weight of the sum over all weights of N_l sum_e f_e P_e, f the shares of the (token, choice) pairs.
    Identity at init (B_e = 0). Not mergeable, unless there is one expert everywhere.
    Parameters: sum over weights of N_l (r (in + out) + in).  Source: Gao et al. 2024, sections 3.1 and 3.2.
    When: a mixture of LoRAs with a fixed number of experts, of which the upper layers shall have more.
    """
    (of,) = flatten(get("lora")(r=r, alpha=alpha, dropout=dropout))
    at = "q, k, v, o, gate, up, down | q, k, v, o, up, down | q, k, v, o, gate_up, down | linear"
    return [
        Mixture(of=of, experts=experts, top_k=top_k, renormalise=True, router_init="kaiming", balance=balance, at=at)
    ]
