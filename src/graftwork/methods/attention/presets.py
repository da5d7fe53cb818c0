"""Published recipes made of what happens inside attention."""

from __future__ import annotations

from graftwork.core.method import Method, preset

from ..activation.bottleneck import Bottleneck
from ..input.pruned_vpt import PrunedVPT
from .kv_prompt import KVPrompt
from .laplacian import Laplacian
from .prefix import Prefix


@preset("prefix_tuning")
def prefix_tuning(
    length: int = 10, mid: int = 512, dropout: float = 0.0, shift_positions: bool = False
) -> list[Method]:
    """Prefix-Tuning as published: an MLP makes the prefix in training, and is left out of the file.

    shift_positions: real tokens are numbered from `length` on.  Li and Liang 2021, section 4.3.
    When: as prefix, made by an MLP in training, which makes it less sensitive.
    """
    at = "attn, entry" if shift_positions else "attn"
    return [Prefix(length=length, reparam="mlp", mid=mid, dropout=dropout, at=at)]


@preset("p_tuning_v2")
def p_tuning_v2(length: int = 8, projection: bool = False, mid: int = 512, dropout: float = 0.1) -> list[Method]:
    """P-Tuning v2: a prefix in every layer for understanding tasks, with the model's own head trained beside it.

    projection: make the prefix by an MLP.  Liu et al. 2022, section 3; THUDM/P-tuning-v2.
    When: understanding tasks (tagging, reading) with prefixes; needs its published, higher learning rates.
    """
    return [Prefix(length=length, reparam="mlp" if projection else "flat", mid=mid, dropout=dropout)]


@preset("p_adapter")
def p_adapter(p: float = 1.25, mu0: float = 0.1, reduction: int = 8, pool: int | None = None) -> list[Method]:
    """p-Adapter: message passing along the map of every attention, and an ordinary bottleneck behind every feed-forward layer.

    p: 1.25 for question answering, 1.5 (with mu0=10) for entailment, 1.75 for captions.  reduction: d / m of both.
    pool: how many averaged keys cross-attention has.
    Parameters, m = d // reduction: 3 d m + 2 m + d + 1 per attention, 2 d m + m + d per feed-forward layer.  Wu et al. 2024.
    When: vision-and-language generation, where which tokens attend to which shall be adapted, too.
    """
    return [Laplacian(p=p, mu0=mu0, reduction=reduction, pool=pool), Bottleneck(reduction=reduction, at="mlp")]


@preset("e2vpt")
def e2vpt(n_p: int = 10, n_kv: int = 5, segments: int = 16, dropout: float = 0.1, drop: bool = False) -> list[Method]:
    """E^2VPT: deep visual prompts that can be pruned, and key-value prompts inside of every attention.

    n_p: visual prompts of a block (the paper tries 1 to 100).  n_kv: key-value prompts (1 to 50; 0: none, which is VPT).
    segments, drop: of the pruning, which gw.Rewinding does.
    Parameters: L n_p d, less what is pruned, and L n_kv d.  Han et al. 2023; 0.32% of ViT-B in its mean over VTAB-1k.
    When: as vpt, with a part of its prompts pruned away and with prompts inside attention.
    """
    prompts = PrunedVPT(num_tokens=n_p, segments=segments, dropout=dropout, drop=drop)
    return [prompts, KVPrompt(length=n_kv)] if n_kv else [prompts]
