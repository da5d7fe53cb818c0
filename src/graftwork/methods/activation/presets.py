"""Published recipes made of bottleneck adapters, each under its own name.

Houlsby et al. 2019, arXiv 1902.00751 · Bapna and Firat 2019, arXiv 1909.08478 (the placement known as Pfeiffer's) ·
He et al. 2021, arXiv 2110.04366 (scaled parallel adapter, MAM) · Pfeiffer et al. 2020, arXiv 2005.00052 (MAD-X) ·
Steitz and Roth 2024, arXiv 2406.06820 (Adapter+).
"""

from __future__ import annotations

from graftwork.core.errors import GraftError
from graftwork.core.method import Method, flatten, get, preset

from ..weight.full import Full
from .bottleneck import Bottleneck


@preset("houlsby")
def Houlsby(
    d: int = 64, act: str = "gelu", init: str = "houlsby", init_std: float = 1e-3, norms: bool = True
) -> list[Method]:
    """h + U g(D h + b_D) + b_U on the output of self-attention and of the feed-forward layer, before the residual add.

    d: bottleneck width m.  init: "houlsby" truncated normal of init_std, cut at 2 std (near the identity), "zero_up"
        or "lora" exact.
    norms: every layer norm of the backbone is trained with the adapters.
    Parameters: L (2 (2 m d + d + m)) + 2 d per layer norm.  Source: Houlsby et al. 2019, section 2 and google-
        research/adapter-bert.
    When: the original reference: two bottlenecks in each block.
    """
    adapters = Bottleneck(d=d, act=act, init=init, init_std=init_std, at="self.attn, mlp")
    return [adapters, Full(at="norm")] if norms else [adapters]


@preset("pfeiffer")
def Pfeiffer(d: int = 64, act: str = "relu", norm: str = "before", init: str = "lora") -> list[Method]:
    """z + U relu(D LN(z) + b_D) + b_U on the output z of every block, LN being the adapter's own.

    d: bottleneck width b.  norm: "before" D or "none".  init: "lora" starts at the identity, "bert" and "houlsby"
        near it.
    Parameters per block: 2 d b + b + d + 2 d.  Source: Bapna and Firat 2019, section 3; the placement of AdapterFusion.
    When: the bottleneck to stack and fuse: half of Houlsby's parameters at about its quality.
    """
    return [Bottleneck(d=d, act=act, norm=norm, init=init, at="block")]


@preset("parallel")
def Parallel(
    d: int = 512, scale: float = 4.0, learned: bool = False, dropout: float = 0.0, act: str = "relu"
) -> list[Method]:
    """y = FFN(x) + s (U relu(D x + b_D) + b_U),  x the input of the feed-forward layer as that layer sees it.

    d: bottleneck width.  scale: s (4 for generation, 2 for GLUE).  learned: s is one trained scalar, starting at
        `scale`.
    dropout: between relu and U.  Parameters per layer: 2 d r + r + d.  Source: He et al. 2021, section 4.6.
    When: adapters on the feed-forward layers of generators, where parallel placement was found best.
    """
    scaling = "scalar" if learned else "fixed"
    return [
        Bottleneck(
            d=d, act=act, position="parallel", scale=scale, scaling=scaling, dropout=dropout, init="lora", at="mlp"
        )
    ]


@preset("mam")
def MAM(length: int = 30, d: int = 512, scale: float = 4.0, reparam: str = "mlp", mid: int = 800) -> list[Method]:
    """Mix-and-match: a short prefix in every attention and the scaled parallel adapter on the feed-forward layer.

    length, reparam ("mlp" or "flat"), mid: of the prefix;  d, scale: of the parallel adapter.
    Small setting for GLUE: length=16, d=16, scale=2.
    Parameters stored: 2 d l per attention, 2 d r + r + d per feed-forward layer.  Source: He et al. 2021, section 4.6.
    When: the unified view's best mix for generation and large data.
    """
    prefix = get("prefix")(length=length, reparam=reparam, mid=mid)
    return [*flatten(prefix), *Parallel(d=d, scale=scale)]


@preset("mad_x_language")
def MADXLanguage(reduction: int = 2, act: str = "relu", coupling: str = "nice", inv_reduction: int = 2) -> list[Method]:
    """LA = U relu(D LN(f + x) + b_D) + b_U + f behind the feed-forward layer (f its output, x the residual stream, LN its own frozen
    norm), and an invertible adapter at the embeddings and the LM head.

    reduction: d / m.  coupling, inv_reduction: of the invertible adapter ("none" leaves it out).
    at: "mlp.norm", for post-norm backbones (BERT, XLM-R); for pre-norm ones give at="mlp".  layers="0--2" leaves the last one
        without, as MAD-X 2.0 does.
    Train it by masked language modelling; then train a task adapter on top of it: gw.activate(model, "en >> task").
    Parameters: L (2 d m + m + d) + those of the invertible adapter.  Source: Pfeiffer et al. 2020, sections 4.1 and 4.3.
    When: first stage of transfer to other languages.
    """
    adapters = Bottleneck(reduction=reduction, act=act, position="sum", init="bert", at="mlp.norm")
    if coupling == "none":
        return [adapters]
    return [adapters, *flatten(get("invertible")(coupling=coupling, reduction=inv_reduction, act=act))]


@preset("mad_x_task")
def MADXTask(reduction: int = 16, act: str = "relu") -> list[Method]:
    """TA = U relu(D LN(LA + x) + b_D) + b_U + LA on top of a language adapter LA, in the same place; no invertible adapter.

    reduction: d / m.  at: as for mad_x_language.  Activate it with the language's, "en >> task" in training (the language adapter's
    `trainable` set to False) and "de >> task" for another language.
    Parameters: L (2 d m + m + d).  Source: Pfeiffer et al. 2020, section 4.2.
    When: second stage: a task on top of a language, which can then be exchanged.
    """
    return MADXLanguage(reduction=reduction, act=act, coupling="none")


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
    When: vision transformers: the bottleneck's setting that won on VTAB.
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
