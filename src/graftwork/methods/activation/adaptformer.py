"""AdaptFormer: the scaled parallel bottleneck of vision transformers.

Chen et al. 2022, "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", arXiv 2205.13535, section 3.
"""

from __future__ import annotations

from graftwork.core.errors import GraftError
from graftwork.core.method import Method, preset

from .bottleneck import Bottleneck


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
