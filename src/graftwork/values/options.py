"""The rules of `combine`, the options that each of them has, and what both are checked for. Light: the command line's help reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real

from ..core.errors import GraftError, nearest
from ..expressions.algebra import Expr

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


@dataclass(frozen=True)
class Options:
    """What `combine` was given beside the weights; None: not given."""

    r: int | None
    energy: float | None
    density: float | None
    majority: str | None
    scope: str | None
    seed: int | None


def spelled(weights: object) -> str:
    """A weighted sum or an expression as text; what is neither, as Python shows it."""
    if isinstance(weights, Expr | str):
        return str(weights)
    if not isinstance(weights, Mapping) or not weights:
        return repr(weights)
    return " + ".join(f"{w}*{n}" for n, w in weights.items())


def check_weights(weights: Mapping[str, float], asked: str) -> dict[str, float]:
    """The weights as floats. GraftError unless there are some, all finite numbers."""
    if not isinstance(weights, Mapping) or not weights:
        raise GraftError(asked, "no adapters with weights", "give their names and weights, {'a': 0.5, 'b': 0.5}")
    for n, w in weights.items():
        if not is_number(w):
            raise GraftError(asked, f"the weight {w!r} of {n!r}", "give a finite number")
        if not isinstance(n, str):
            raise GraftError(asked, f"an adapter called {n!r}", "give their names, which are texts")
    return {n: float(w) for n, w in weights.items()}


def is_number(value: object) -> bool:
    """Whether this is a finite real number, in whatever form."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def is_share(value: object) -> bool:
    """Whether this is a number above 0 and at most 1."""
    return is_number(value) and 0 < value <= 1  # type: ignore[operator]


def is_rank(value: object) -> bool:
    """Whether this is a whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_options(weights: Mapping[str, float], how: str, options: Options, asked: str) -> None:
    """GraftError for an unknown rule, an option that it does not have, and values out of range."""
    if how not in RULES:
        raise GraftError(asked, f"no such rule{nearest(str(how), RULES)}", f"choose one of {', '.join(RULES)}")
    for field in fields(Options):
        if getattr(options, field.name) is not None and field.name not in RULES[how]:
            has = ", ".join(RULES[how]) or "no option"
            raise GraftError(asked, f"{field.name}, which has no effect on {how!r}", f"it has {has}")
    r, energy, density = options.r, options.energy, options.density
    if r is not None and not is_rank(r):
        raise GraftError(asked, f"r={r!r}", "give a whole number from 1 on")
    for word, share in (("energy", energy), ("density", density)):
        if share is not None and not is_share(share):
            raise GraftError(asked, f"{word}={share!r}", f"{word} is a share: above 0, at most 1")
    if options.majority not in (None, "total", "frequency", "unweighted"):
        raise GraftError(asked, f"majority={options.majority!r}", "choose total, frequency or unweighted")
    if options.scope not in (None, "site", "adapter"):
        raise GraftError(asked, f"scope={options.scope!r}", "choose site or adapter")
    if not isinstance(options.seed, int | None):
        raise GraftError(asked, f"seed={options.seed!r}", "give a whole number")
    if how == "slerp" and not (
        len(weights) == 2 and abs(sum(weights.values()) - 1) < 1e-9 and min(weights.values()) >= 0
    ):
        raise GraftError(asked, "slerp goes from one adapter to another", "give two weights, 1 - t and t, t in [0, 1]")
