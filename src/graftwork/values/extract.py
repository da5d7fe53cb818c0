"""Extracting an adapter from a checkpoint that was tuned as a whole; no data, no gradients.

PHLoRA (2025), "data-free Post-hoc Low-Rank Adapter extraction from full-rank checkpoint".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.errors import GraftError
from ..core.site import Site
from ..grafting.graft import check_name
from ..grafting.install import check_free
from ..grafting.root import body_of
from ..sites.body import Body
from ..sites.where import select
from .change import Change
from .hold import Composed, Piece, cut, hold
from .options import is_rank, is_share
from .places import site_of


@torch.no_grad()
def extract(
    base: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor],
    name: str = "extracted",
    *,
    r: int | None = 64,
    energy: float | None = None,
    at: str = "linear | conv",
    rest: bool = False,
) -> Composed:
    """A LoRA on `base` that brings its weights as near to those of `tuned` as rank r can, site by site:

        D = W_tuned - W_base = U S V^T,   A = sqrt(S_r) V_r^T [r, in],   B = U_r sqrt(S_r) [out, r],   alpha = r

    tuned: a model of the same architecture, or its state dict.  energy: the smallest rank up to r that keeps this share of
    |D|^2, which may differ from site to site.  at: which weights (see `gw.anatomy`).  A changed task head is kept whole.
    rest: also keep everything else that changed: biases and norms as differences, embeddings as they are. Otherwise, and
    where the backbone has no site for it, it is left out, and `left` gives its relative change |D| / |W|.
    A weight that several modules share is decomposed and stored once; one that did not change gets no adapter.
    Returns the adapter, active on `base`, and the error of every site, sqrt(1 - energy kept).
    Raises GraftError, with `base` as it was, for another architecture, and for values that are not finite.
    """
    asked = f"extract {name!r} from {type(tuned).__name__} on {type(base).__name__}"
    body = body_of(base)
    check_free(base, body)
    check_name(base, name)
    if r is not None and not is_rank(r):
        raise GraftError(asked, f"r={r!r}", "give a whole number from 1 on")
    if energy is not None and not is_share(energy):
        raise GraftError(asked, f"energy={energy!r}", "give a share: above 0, at most 1")
    if not isinstance(tuned, nn.Module | Mapping):
        raise GraftError(asked, f"{tuned!r}", "give the tuned model, or its state dict")
    changed = _changed(body, tuned, asked)
    pieces = _pieces(body, changed, at, r, energy)
    held = {(piece.site.path, piece.site.param) for piece in pieces}
    shifts: dict[tuple[str, str], tuple[Site, Tensor]] = {}
    values: dict[str, tuple[Site, dict[str, Tensor]]] = {}
    left = {}
    heads = {site.path for site in body.anatomy.of("head")}
    known = {site.path for site in body.anatomy.sites}
    for full_name, (old, new) in changed.items():
        path, _, param = full_name.rpartition(".")
        if (path, param) in held or torch.equal(old, new):
            continue
        site = site_of(body, [], path, param, None) if path in known and (rest or path in heads) else None
        if site is None:
            left[full_name] = float((new.double() - old.double()).norm() / old.double().norm())
        elif path in heads or old.dim() > 1:
            own = {n: changed[f"{path}.{n}"][1] for n, p in site.module._parameters.items() if p is not None}
            values[path] = (site, own)
        else:
            shifts[path, param] = (site, new.double() - old.double())
    recipe = {"of": type(tuned).__name__, "how": "extract", "r": r, "energy": energy}
    return hold(base, body, name, pieces, shifts, values, left=left, recipe=recipe)


def _pieces(
    body: Body, changed: Mapping[str, tuple[Tensor, Tensor]], at: str, r: int | None, energy: float | None
) -> list[Piece]:
    first = {id(p): n for n, p in body.parameters.items()}
    chosen = [s for s in select(body.anatomy, at, None) if s.weight.is_matrix]
    sites = [site_of(body, [], s.path, s.param, s.rows) for s in chosen]  # under their most telling role
    names = {site.key: first[id(site.module._parameters[site.param])] for site in sites}
    moved = [s for s in sites if not torch.equal(*changed[names[s.key]])] or sites
    done: dict[tuple[str, tuple[int, int] | None], Piece] = {}
    out = []
    for site in moved:
        key = (names[site.key], site.rows)
        if key in done:
            piece = replace(done[key], site=site)
        else:
            old, new = (site.weight.dense(t.to("cpu", torch.float64)) for t in changed[names[site.key]])
            done[key] = piece = cut(site, Change(matrix=new - old), r, energy)
        out.append(piece)
    return out


def _changed(body: Body, tuned: nn.Module | Mapping[str, Tensor], asked: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(base, tuned) by the name of the parameter. GraftError where names, shapes or ties differ."""
    if isinstance(tuned, nn.Module):
        there: Mapping[str, Tensor] = {
            f"{path}.{n}" if path else n: p
            for path, module in body_of(tuned).modules.items()
            for n, p in module._parameters.items()
            if p is not None
        }
    else:
        there = tuned
    aliases, extra = {}, set(there)
    for path, module in body.modules.items():
        extra -= {f"{path}.{n}" if path else n for n in module._buffers}
        for n, p in module._parameters.items():
            full = f"{path}.{n}" if path else n
            extra.discard(full)
            if p is not None and full not in body.parameters:
                aliases[full] = next(name for name, q in body.parameters.items() if q is p)
    do = "give two checkpoints of one architecture"
    missing = [n for n in body.parameters if n not in there]
    if missing or extra:
        side, names = ("the tuned one lacks", missing) if missing else ("the base lacks", sorted(extra))
        raise GraftError(asked, f"{side} {names[0]!r}, and {len(names) - 1} more", do)
    out = {}
    for n, p in body.parameters.items():
        new = there[n]
        if not isinstance(new, Tensor):
            raise GraftError(
                asked, f"{n!r}: {type(new).__name__}, no tensor", "give the tuned model, or its state dict"
            )
        new = new.detach()
        if new.shape != p.shape:
            raise GraftError(asked, f"{n!r}: {list(p.shape)} in the base, {list(new.shape)} in the tuned one", do)
        if new.is_meta or p.is_meta:
            raise GraftError(asked, f"{n!r} is on the meta device", "give both models their weights first")
        if not torch.isfinite(new).all():
            raise GraftError(asked, f"a number that is not finite in {n!r}", "the training has diverged")
        out[n] = (p.detach().cpu(), new.cpu())
    for alias, n in aliases.items():
        if alias in there and not torch.equal(there[alias], there[n]):
            raise GraftError(
                asked, f"{alias!r} and {n!r} differ, which the base shares", "untie them in the base first"
            )
    return out
