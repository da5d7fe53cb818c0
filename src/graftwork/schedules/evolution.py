"""The evolutionary search of GLoRA: which kinds of support tensors each weight gets, under a limit of parameters.

Chavan et al. 2023, arXiv 2306.07967, section 3.3; Arnav0400/ViT-Slim, evolution.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from ..core.errors import GraftError
from ..grafting.graft import activate, active, find
from ..methods.weight.forms.supports import Supports
from ..methods.weight.forms.views import KINDS, Choice
from ..methods.weight.glora import GLoRA

TRIES = 1000  # candidates beyond the limit that are drawn before the limit counts as too small

Candidate = tuple[Choice, ...]


def evolve(
    model: nn.Module,
    name: str,
    score: Callable[[nn.Module], float],
    *,
    limit: int = 1_000_000,
    population: int = 50,
    select: int = 10,
    generations: int = 20,
    p_mutate: float = 0.2,
    seed: int = 0,
) -> tuple[float, int]:
    """Search the supernet `name` (gw.GLoRA(supernet=True)), leave the best candidate in it, and return (its score, its parameters).

    score(model): what is to be large, such as the accuracy on held-out data, of the model as it then is.
    limit: candidates of more parameters are never tried, nor returned.  population: candidates of a generation; half of
    those beyond the `select` best are mutations (each weight drawn again with p_mutate), half crossovers (each weight
    from one of two); what the limit refuses is replaced by random ones. No weights are trained.
    Raises GraftError for an adapter without a supernet, and for a limit that random candidates do not reach.
    """
    asked = f"evolve({name!r}, limit={limit})"
    found = [(part.method, site, part.deltas[site.key]) for part in find(model, name).parts for site in part.sites]
    nets = [(m, site, d) for m, site, d in found if isinstance(m, GLoRA) and m.supernet and isinstance(d, Supports)]
    if not nets:
        raise GraftError(asked, "no supernet", "graft gw.GLoRA(supernet=True), train it, and search then")
    draw, scores = random.Random(seed), {}

    def size(candidate: Candidate) -> int:
        return sum(m.chosen(site, choice) for (m, site, _), choice in zip(nets, candidate, strict=True))

    def put(candidate: Candidate) -> None:
        for (_, _, delta), choice in zip(nets, candidate, strict=True):
            delta.choose(choice)

    def value(candidate: Candidate) -> float:
        if candidate not in scores:
            put(candidate)
            with torch.no_grad():
                scores[candidate] = float(score(model))
        return scores[candidate]

    def one() -> Choice:
        return Choice(*(draw.choice(kinds) for kinds in KINDS.values()))

    def within(make: Callable[[], Candidate]) -> Candidate:
        """The first of what `make` gives that the limit allows."""
        for _ in range(TRIES):
            if size(made := make()) <= limit:
                return made
        raise GraftError(asked, f"{TRIES} candidates, all of them larger", "raise the limit, or lower r")

    def fresh() -> Candidate:
        return tuple(one() for _ in nets)

    def mutated() -> Candidate:
        return tuple(one() if draw.random() < p_mutate else c for c in draw.choice(best))

    def crossed() -> Candidate:
        pair = draw.choice(best), draw.choice(best)
        return tuple(draw.choice(both) for both in zip(*pair, strict=True))

    training, before = model.training, [delta.choice for _, _, delta in nets]
    model.eval()
    try:
        people = [within(fresh) for _ in range(population)]
        for _ in range(generations):
            best = sorted(dict.fromkeys(people), key=value, reverse=True)[:select]
            half = (population - len(best)) // 2
            people = [*best, *(within(make) for make in (mutated, crossed) for _ in range(half))]
            people += [within(fresh) for _ in range(population - len(people))]
        winner = max(people, key=value)
    except BaseException:
        for (_, _, delta), choice in zip(nets, before, strict=True):
            delta.choose(choice)
        raise
    finally:
        model.train(training)
    put(winner)
    activate(model, active(model))  # what is dear to compute is another now
    return scores[winner], size(winner)
