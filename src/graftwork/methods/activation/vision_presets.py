"""Recipes made of bottleneck adapters that were published for images.

Steitz and Roth 2024, arXiv 2406.06820 (Adapter+) · Chen et al. 2022, arXiv 2205.13535 (AdaptFormer).
"""

from __future__ import annotations

from graftwork.core.errors import GraftError
from graftwork.core.method import Method, preset

from .bottleneck import Bottleneck


@preset("adapter_plus")
def AdapterPlus(
    r: int = 8, position: str = "post", init: str = "houlsby", init_std: float = 0.01, drop_path: float = 0.1
) -> list[Method]:
    """z + s * drop_path(U gelu(D z + b_D) + b_U) per block, s one learned number per channel; drop_path per sample,
    in training.

    r: bottleneck width.  position (m = mlp(LN2 y), z = y + m the block's output): "post" z + A(z) · "pre" the layer
        norm and the skip
        see y + A(y) · "parallel" z + A(y) · "intermediate" z + A(m).
    init: "houlsby" truncated normal of init_std, cut at 2 std · "bert" N(0, 0.02^2) · "lora" the identity.
    Parameters: L (2 d r + r + 2 d).  Source: Steitz and Roth 2024, sections 3 and 4.
    """
    places = {
        "post": ("after", "block"),
        "pre": ("before", "mlp"),
        "parallel": ("residual", "mlp"),
        "intermediate": ("after", "mlp"),
    }
    if position not in places:
        raise GraftError(
            f"AdapterPlus(position={position!r})", "no such position", f"choose one of {', '.join(places)}"
        )
    where, at = places[position]
    std = 0.02 if init == "bert" else init_std
    return [
        Bottleneck(d=r, act="gelu", position=where, scaling="channel", drop_path=drop_path, init=init, init_std=std,
                   lora_bias=init == "lora", at=at)
    ]  # fmt: skip


@preset("adaptformer")
def AdaptFormer(
    d: int = 64, scale: float = 0.1, dropout: float = 0.1, norm: str = "none", sequential: bool = False
) -> list[Method]:
    """x' + MLP(LN2 x') + s (U drop(relu(D h + b_D)) + b_U), h = x' the residual stream in front of the layer's own norm LN2.

    d: bottleneck width.  scale: s, fixed.  dropout: between relu and U.
    norm: "none" as released · "in" h is normed by a LayerNorm of the adapter's own, as in the paper's equation · "shared" h = LN2 x'.
    sequential: the ablation that is worse, on the MLP's output in the place of x'.  Starts at the identity (U = 0).
    When: image and video transformers, plain or windowed: the parallel adapter with one fixed small scale, nothing to tune but d.
    Parameters per block: 2 d_model d + d + d_model (and 2 d_model with norm="in").  Source: Chen et al. 2022, section 3 and
        ShoufaChen/AdaptFormer.
    """
    places = {"none": "residual", "in": "residual", "shared": "parallel"}
    if norm not in places or (sequential and norm == "shared"):
        found = "the MLP's output has no norm to share" if norm in places else "no such norm"
        raise GraftError(f"AdaptFormer(norm={norm!r}, sequential={sequential})", found, "choose norm='none' or 'in'")
    position = "after" if sequential else places[norm]
    own = "before" if norm == "in" else "none"
    return [
        Bottleneck(d=d, act="relu", position=position, norm=own, scale=scale, dropout=dropout, init="lora", at="mlp")
    ]
