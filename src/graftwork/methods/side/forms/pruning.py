"""Side blocks cut out of the backbone's: the strongest units, the same residual channels in all layers (LST, 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.errors import GraftError
from graftwork.core.site import Site
from graftwork.core.weight import Weight, weight_of

Importance = Mapping[str, Tensor]  # name of a parameter -> importance of each of its numbers, in its stored shape
HEADS, HIDDEN = ("q", "k", "v", "o"), ("up", "gate", "gate_up", "down")
CHOSEN: WeakKeyDictionary[Part, Tensor] = WeakKeyDictionary()


def channels(part: Part, width: int, size: int, importance: Importance | None = None) -> Tensor:
    """The kept channels [width] of the residual stream of size `size`: one choice for all layers."""
    if part not in CHOSEN:
        score: Any = 0.0
        for s in part.anatomy.sites:
            if s.role in HEADS + HIDDEN + ("embed",) and s.weight.is_matrix and s.rows is None:
                w = _importance(s, importance)
                if s.role in ("o", "down", "embed") and w.shape[0] == size:
                    score = score + w.sum(1)
                elif s.role not in ("o", "down", "embed") and w.shape[1] == size:
                    score = score + w.sum(0)
        CHOSEN[part] = _strongest(torch.as_tensor(score), width)
    return CHOSEN[part]


@torch.no_grad()
def prune(side: nn.Module, site: Site, part: Part, importance: Importance | None = None) -> None:
    """Fill a side block with rows and columns of the backbone's block at `site`. importance: |w| by default."""
    if next(side.parameters()).is_meta:
        return
    thin = dict(side.named_parameters())
    d = site.d
    r = d // _width(side, site, d)
    residual = channels(part, d // r, d, importance)
    written: set[str] = set()
    for group in _groups(site, part):
        units = _units(group, [_thin(side, site, s, r).d_out for s in group], importance)
        for s in group:
            rows, columns = _axes(s, units, residual)
            view, full = _thin(side, site, s, r), s.module._parameters
            name = s.path.removeprefix(site.path).removeprefix(".")
            target = thin[f"{name}.{view.name}"]
            target.copy_(view.restore(target, s.weight.dense(full[s.weight.name])[rows][:, columns]))  # type: ignore[arg-type]
            written.add(f"{name}.{view.name}")
            own = s.weight.bias_of(full.get(s.weight.bias or ""))
            if view.bias is not None and own is not None:
                bias = thin[f"{name}.{view.bias}"]
                bias.copy_(view.restore_bias(bias, own[rows]))  # type: ignore[arg-type]
                written.add(f"{name}.{view.bias}")
    for name, target in thin.items():
        whole = dict(site.module.named_parameters()).get(name)
        if name not in written and whole is not None:
            if whole.shape == target.shape:
                target.copy_(whole)  # relative positions: one row per bucket and head
            elif whole.shape == (d,):
                target.copy_(whole[residual])
    if not written:
        raise GraftError(f"side blocks cut out of {site.key}", "no projections with known roles", "use init='random'")


def _thin(side: nn.Module, site: Site, s: Site, r: int) -> Weight:
    """What a site of the backbone's block is in the side block."""
    rows = None if s.rows is None else (s.rows[0] // r, s.rows[1] // r)
    return weight_of(side.get_submodule(s.path.removeprefix(site.path).removeprefix(".")), s.param, rows, s.transposed)


def _width(side: nn.Module, site: Site, d: int) -> int:
    full = dict(site.module.named_parameters())
    return min(
        d * p.shape[i] // n
        for name, p in side.named_parameters()
        if name in full
        for i, n in enumerate(full[name].shape)
        if n == d
    )


def _groups(site: Site, part: Part) -> list[list[Site]]:
    """The sites of the block that are cut together: one attention, one feed-forward."""
    groups = []
    for role, members in (("attn", HEADS), ("mlp", HIDDEN)):
        for place in part.inside(site, role):
            group = [s for member in members for s in part.inside(place, member) if s.role == member]
            if len(group) == len({s.role for s in group}) and len(group) > 1:
                groups.append(group)
    return groups


def _importance(s: Site, importance: Importance | None) -> Tensor:
    stored = s.module._parameters[s.weight.name]
    assert stored is not None
    given = stored if importance is None else importance.get(f"{s.path}.{s.weight.name}", torch.zeros_like(stored))
    return s.weight.dense(given.detach()).abs().float()


def _units(group: list[Site], sizes: list[int], importance: Importance | None) -> dict[str, Tensor]:
    """The kept units of each role's inner axis: the largest products of the importances of what shares a unit.

    sizes: d_out of each site in the side block.
    """
    thin = {s.role: n for s, n in zip(group, sizes, strict=True)}
    inner = {s.role: _importance(s, importance).sum(0 if s.role in ("o", "down") else 1) for s in group}
    if "q" not in inner:
        size = inner["down"].shape[0]
        score = torch.stack([v.view(-1, size).prod(0) for v in inner.values()]).prod(0)
        kept = _strongest(score, next(n * size // inner[role].shape[0] for role, n in thin.items() if role != "down"))
        return {role: torch.cat([kept + i * size for i in range(v.shape[0] // size)]) for role, v in inner.items()}
    heads = next(s.heads for s in group if s.role == "q")
    if heads is None:
        raise GraftError(
            f"side blocks cut out of {group[0].key}", "its number of heads is not known", "use init='random'"
        )
    d_head = inner["q"].shape[0] // heads
    per = {role: v.view(-1, d_head) for role, v in inner.items()}  # [heads or key heads, d_head]
    few = min(v.shape[0] for v in per.values())
    score = torch.stack([v.view(few, -1, d_head).mean(1) for v in per.values()]).prod(0)
    kept = torch.stack([_strongest(row, thin["q"] // heads) for row in score])  # [key heads, thin d_head]
    out = {}
    for role, v in per.items():
        every = kept.repeat_interleave(v.shape[0] // few, 0)
        out[role] = (every + torch.arange(v.shape[0], device=every.device)[:, None] * d_head).flatten()
    return out


def _axes(s: Site, units: dict[str, Tensor], residual: Tensor) -> tuple[Tensor, Tensor]:
    return (residual, units[s.role]) if s.role in ("o", "down") else (units[s.role], residual)


def _strongest(score: Tensor, n: int) -> Tensor:
    """The positions of the n largest, in order."""
    return score.topk(n).indices.sort().values
