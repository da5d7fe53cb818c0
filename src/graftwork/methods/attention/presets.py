"""Published recipes made of prefixes."""

from __future__ import annotations

from graftwork.core.method import Method, preset

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
