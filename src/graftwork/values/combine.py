"""Combining finished adapters of weights into one LoRA.

What every rule means is said of dense changes: dW_e = W'_e - W of the adapter e at one weight, w_e its weight.
An adapter that does not act on a weight has no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..core.site import Site
from ..expressions.algebra import Expr
from ..grafting.graft import check_name
from ..grafting.install import check_free
from ..grafting.root import body_of
from . import factors, rules
from .change import Change, weighted_sum
from .heads import summed_values
from .hold import Composed, Piece, cut, hold, piece
from .options import DENSITY, Options, check_options, spelled
from .places import Place, places
from .terms import terms


@torch.no_grad()
def combine(
    model: nn.Module,
    name: str,
    of: Mapping[str, float] | Expr | str,
    how: str = "cat",
    *,
    r: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority: str | None = None,
    scope: str | None = None,
    seed: int | None = None,
    head: str | None = None,
) -> Composed:
    """A new adapter `name`, a plain LoRA, out of adapters that are on `model` and change weights. It becomes the active one.

    of: w_e by the adapter's name, of any sign, or an expression that is such a sum: "0.5*a + 0.5*b", "mean(a, b) - c", also of
    stacks, "de >> ner", and of drop(a, ...).  how, with T the change of one weight that the result stands for:
        "cat"              T = sum_e w_e dW_e, exact; its rank is the sum of the ranks
        "svd"              the same T, cut at rank r
        "linear"           B A of A = sum_e sign(w_e) sqrt|w_e s_e| A_e, B = sum_e sqrt|w_e s_e| B_e: LoRAs of equal rank
                           only; holds cross terms B_e A_f, so it is near T only for adapters that are nearly alike
        "linear_b"         the same T for LoRAs with one common A: B = sum_e w_e s_e B_e; exact, at their own rank
        "slerp"            two adapters, weights 1 - t and t: dW at the share t of the angle between them
        "ties"             each dW_e trimmed to its largest entries, then the mean of those with the elected sign
        "dare_linear"      sum_e w_e of dW_e with entries dropped at random, the rest divided by density
        "dare_ties"        the same, with the signs elected as in ties
        "magnitude_prune"  sum_e w_e of dW_e trimmed to its largest entries
    r: T is cut at this rank (Eckart-Young); None: the largest of the inputs', for slerp all.  energy: keep this share of |T|^2.
    density: the share of entries that stays, in (0, 1]; ties 0.2, dare 0.1, magnitude_prune 0.5.
    majority: "total", "frequency" or "unweighted" (see `rules.elect`).  scope: density of each "site" (default) or of the
    whole "adapter".  seed: of the draws (0).
    head: the adapter whose own head is kept; None: heads are summed like all else, V = V_0 + sum_e w_e (V_e - V_0).
    Biases and norms are summed with the weights, whatever the rule. Of a stack the last head counts.
    Labels and metadata are kept where all inputs agree.
    Returns the adapter and the error of every site. Raises GraftError, with the model as it was, for an unknown adapter,
    a weight that is no finite number, a method that changes activations, an option without effect.
    Sources: HF PEFT's add_weighted_adapter; arXiv 2306.01708 (TIES), 2311.03099 (DARE).
    """
    asked = f"combine {spelled(of)} by {how!r}"
    options = Options(r, energy, density, majority, scope, seed)
    body = body_of(model)
    check_free(model, body)
    check_name(model, name)
    parts = terms(model, of, asked)
    weights, adapters = {n: w for n, (w, _) in parts.items()}, [adapter for _, adapter in parts.values()]
    check_options(weights, how, options, asked)
    found = places(adapters, body, asked)
    values = summed_values(found.whole, weights, head, adapters, asked)
    shifts = {}
    for place in found.vectors:
        total = sum(weights[n] * place.shift(n) for n in place.chains)
        shifts[place.site.path, place.param] = (place.site, total)
    pieces = _pieces(found.matrices, adapters, weights, how, options, asked)
    recipe = {"of": dict(weights), "how": how, **{k: v for k, v in vars(options).items() if v is not None}}
    owner = None if head is None else parts[head][1]
    return hold(model, body, name, pieces, shifts, values, adapters, owner, recipe=recipe)  # type: ignore[arg-type]


def _pieces(
    matrices: list[Place],
    adapters: list[Adapter],
    weights: Mapping[str, float],
    how: str,
    options: Options,
    asked: str,
) -> list[Piece]:
    """What each weight becomes."""
    if how in ("linear", "linear_b"):
        return [factors.merged(place, weights, how, asked) for place in matrices]
    pruned = _pruned(matrices, how, options) if options.scope == "adapter" else {}
    out: list[Piece] = []
    large: list[tuple[Site, int, float]] = []
    for place in matrices:
        changes = {n: place.change(n) for n in weights if n in place.chains}
        wanted = _wanted(place.site, changes, weights, how, options, pruned)
        if how == "cat":
            whole = _whole(place.site, wanted)
            if whole is None:
                large.append((place.site, wanted.spectrum.needed, (1 - wanted.spectrum.energy(16)) ** 0.5))
            else:
                out.append(whole)
            continue
        rank = options.r
        ranks = [change.r for change in changes.values()]
        if rank is None and options.energy is None and how != "slerp":
            if None in ranks:
                found = f"an update at {place.site.key} that is not of low rank, and no rank"
                raise GraftError(asked, found, "say how much to keep: r=16, or energy=0.99")
            rank = max(n for n in ranks if n is not None)
        out.append(cut(place.site, wanted, rank, options.energy))
    if large:
        raise _too_large(large, len(matrices), asked)
    return out


def _whole(site: Site, wanted: Change) -> Piece | None:
    """All of it: the factors as they are, or by singular values where they would be larger than the weight; None: so are these."""
    if wanted.thin is not None and wanted.thin[0].shape[-2] <= min(site.weight.shape[-2:]):
        return piece(site, wanted, *wanted.thin)
    return None if wanted.too_large else cut(site, wanted)


def _too_large(large: list[tuple[Site, int, float]], n: int, asked: str) -> GraftError:
    """What a cut at rank 16 would lose. large: the weights without an exact LoRA, the ranks of their changes, the errors."""
    (site, rank, _), errors = large[0], {site.key: error for site, _, error in large}
    worst, (d_out, d_in) = max(errors, key=errors.__getitem__), site.weight.shape[-2:]
    found = f"the update at {site.key} [{d_out}, {d_in}] has rank {rank}, as LoRA larger than the weight"
    found += f", and so at {len(large)} of {n} weights" if len(large) > 1 else ""
    lost = f"leaves an error of {sum(errors.values()) / len(large):.3f} on average, {errors[worst]:.3f} at {worst}"
    return GraftError(asked, found, f"cut it: how='svd', r=16 (--how svd --rank 16) {lost}")


def _wanted(
    site: Site,
    changes: Mapping[str, Change],
    weights: Mapping[str, float],
    how: str,
    options: Options,
    pruned: Mapping[tuple[str, str], Tensor],
) -> Change:
    """T."""
    signed = [weights[n] for n in changes]
    if how == "slerp" and len(changes) == 2:
        first, last = changes.values()
        signed = list(rules.slerp(first, last, signed[1]))
    if how in ("cat", "svd", "slerp"):
        return weighted_sum(zip(signed, changes.values(), strict=True))
    density = DENSITY[how] if options.density is None else options.density
    if how.startswith("dare"):
        seed = options.seed or 0
        trimmed = [rules.drop(c.dense, density, seed, n, site.key) for n, c in changes.items()]
    elif pruned:
        trimmed = [pruned[n, site.key] for n in changes]
    else:
        trimmed = [rules.keep_largest([c.dense], density)[0] for c in changes.values()]
    if how in ("ties", "dare_ties"):
        return Change(matrix=rules.elect(trimmed, signed, options.majority or "total"))
    return weighted_sum((w, Change(matrix=t)) for w, t in zip(signed, trimmed, strict=True))


def _pruned(matrices: list[Place], how: str, options: Options) -> dict[tuple[str, str], Tensor]:
    """The entries that one threshold per adapter keeps, by adapter and site."""
    density = DENSITY[how] if options.density is None else options.density
    out: dict[tuple[str, str], Tensor] = {}
    for n in dict.fromkeys(n for place in matrices for n in place.chains):
        own = [place for place in matrices if n in place.chains]
        kept = rules.keep_largest([place.change(n).dense for place in own], density)
        out |= {(n, place.site.key): t for place, t in zip(own, kept, strict=True)}
    return out
