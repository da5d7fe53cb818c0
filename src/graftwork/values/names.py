"""The rules of `combine` and the options that each of them has; imports nothing, for the help of the command line."""

from __future__ import annotations

RANK = ("r", "energy")
RULES: dict[str, tuple[str, ...]] = {
    "cat": (),
    "linear": (),
    "linear_b": (),
    "svd": RANK,
    "slerp": RANK,
    "ties": (*RANK, "density", "majority"),
    "dare_linear": (*RANK, "density", "seed"),
    "dare_ties": (*RANK, "density", "seed", "majority"),
    "magnitude_prune": (*RANK, "density", "scope"),
}
DENSITY = {"ties": 0.2, "dare_linear": 0.1, "dare_ties": 0.1, "magnitude_prune": 0.5}
