"""Holding changes of weights in an ordinary adapter: LoRA for matrices, differences for vectors, values for heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Part
from ..core.initial import Later
from ..core.method import Method
from ..core.site import Site
from ..grafting.graft import attach, build
from ..methods.weight.bitfit import BitFit
from ..methods.weight.full import Full
from ..methods.weight.ln_tuning import LNTuning
from ..methods.weight.lora import LoRA
from ..sites.body import Body
from .change import Change


@dataclass(frozen=True)
class Fit:
    """How well one weight is held.  shape: (out, in) of its dense view.  r: the rank it is held with.

    error: |dW - B A| / |dW| in the Frobenius norm, of A and B as they are stored; 0 where dW is zero.
    """

    site: str
    shape: tuple[int, ...]
    r: int
    error: float

    @property
    def energy(self) -> float:
        """The share of |dW|^2 that is kept, 1 - error^2."""
        return 1 - self.error**2


@dataclass(frozen=True)
class Composed:
    """A new adapter, which is on the model and active, and how well it holds each weight's wanted change.

    left: relative changes of parameters that it does not hold, by name (`extract`).
    """

    adapter: Adapter
    sites: tuple[Fit, ...]
    left: Mapping[str, float]

    @property
    def error(self) -> float:
        """The largest error of all weights."""
        return max((fit.error for fit in self.sites), default=0.0)


@dataclass(frozen=True)
class Piece:
    """The factors that hold one weight's change, in the weight's precision, and their error (see `Fit`)."""

    site: Site
    down: Tensor
    up: Tensor
    error: float


def piece(site: Site, wanted: Change, down: Tensor, up: Tensor) -> Piece:
    """up down in the place of the change that is wanted, which is not kept."""
    like = site.weight.like
    dtype = like.dtype if like is not None and like.is_floating_point() else torch.float32
    down, up = down.to(dtype).contiguous(), up.to(dtype).contiguous()
    whole = float(wanted.dense.norm())
    error = float((wanted.dense - up.double() @ down.double()).norm()) / whole if whole else 0.0
    return Piece(site, down, up, error)


def cut(site: Site, wanted: Change, r: int | None = None, energy: float | None = None) -> Piece:
    """By its singular value decomposition: at most rank r, no more than `energy` asks for, None: all there is."""
    return piece(site, wanted, *wanted.spectrum.factors(max(1, wanted.spectrum.rank(r, energy))))


@torch.no_grad()
def hold(
    model: nn.Module,
    body: Body,
    name: str,
    pieces: Sequence[Piece],
    shifts: Mapping[tuple[str, str], tuple[Site, Tensor]],
    values: Mapping[str, tuple[Site, dict[str, Tensor]]],
    like: Sequence[Adapter] = (),
    head: Adapter | None = None,
    left: Mapping[str, float] | None = None,
    recipe: Mapping[str, object] | None = None,
) -> Composed:
    """Attach the adapter `name` that holds `pieces`, one LoRA per rank, `shifts` of vectors by (path, parameter), and
    `values` of whole modules by path.

    like: what these adapters say alike, it says too (task, labels);  head: the one whose labels it takes instead.
    """
    parts, fits = [], []
    for r in sorted({piece.down.shape[-2] for piece in pieces}):
        mine = [piece for piece in pieces if piece.down.shape[-2] == r]
        part = _part(LoRA(r=r, alpha=float(r), at=_roles(p.site for p in mine)), [p.site for p in mine], body)
        tied: dict[int, nn.Module] = {}
        for piece in mine:
            delta = part.deltas[piece.site.key]
            delta.restore({"down": piece.down, "up": piece.up})
            first = tied.setdefault(id(piece.down), delta)
            delta._parameters.update(first._parameters)  # of tied weights: stored once
            fits.append(Fit(piece.site.key, tuple(piece.site.weight.shape), r, piece.error))
        parts.append(part)
    parts += _shifting(shifts, body)
    if values:
        part = _part(Full(at=_roles(site for site, _ in values.values())), [site for site, _ in values.values()], body)
        for site, tensors in values.values():
            part.deltas[site.key].restore({f"values.{n}": t for n, t in tensors.items()})
        parts.append(part)
    adapter = Adapter(name, parts)
    adapter.trainable = False
    inherit(adapter, like)
    if head is not None:
        adapter.labels = head.labels
    if recipe is not None:
        adapter.metadata["composed"] = {**recipe, "error": max((f.error for f in fits), default=0.0)}
    attach(model, adapter, body)
    order = {site.key: i for i, site in enumerate(body.anatomy.sites)}
    return Composed(adapter, tuple(sorted(fits, key=lambda f: order[f.site])), dict(left or {}))


def inherit(adapter: Adapter, of: Sequence[Adapter]) -> None:
    """Take the labels and the metadata that all of these adapters have alike; what was measured or done of one is not its own."""
    for key, value in of[0].metadata.items() if of else ():
        if key not in ("metrics", "training", "composed") and all(
            key in other.metadata and _seedless(other.metadata[key]) == _seedless(value) for other in of
        ):
            adapter.metadata[key] = copy.deepcopy(value)
    labels = {other.labels for other in of if other.labels}
    adapter.labels = labels.pop() if len(labels) == 1 else None


def _seedless(value: object) -> object:
    """What was learnt is alike whatever was drawn on the way."""
    return {k: v for k, v in value.items() if k != "seed"} if isinstance(value, dict) else value


def _part(method: Method, sites: Sequence[Site], body: Body) -> Part:
    return build(method, sites, body.anatomy, Later())


def _roles(sites: object) -> str:
    return ", ".join(dict.fromkeys(site.role for site in sites))  # type: ignore[attr-defined]


def _shifting(shifts: Mapping[tuple[str, str], tuple[Site, Tensor]], body: Body) -> list[Part]:
    """Norms by LN tuning, all other biases by BitFit; a norm's vector that does not change is held as zero."""
    parts: list[Part] = []
    at: dict[str, Site] = {path: site for (path, _), (site, _) in shifts.items()}
    norms = {path for path, site in at.items() if not site.weight.is_matrix}
    missing = any(site.module._parameters[param] is None for (_, param), (site, _) in shifts.items())
    for sites, method in (
        ([s for path, s in at.items() if path in norms], LNTuning),
        ([s for path, s in at.items() if path not in norms], BitFit),
    ):
        if not sites:
            continue
        chosen = method(at=_roles(sites))
        if isinstance(chosen, BitFit):
            chosen = BitFit(add_missing=missing, at=chosen.at)
        part = _part(chosen, sites, body)
        for site in sites:
            delta = part.deltas[site.key]
            own = {n.removeprefix("shift."): torch.zeros(t.shape) for n, t in delta.state_dict().items()}
            own |= {param: t for (path, param), (_, t) in shifts.items() if path == site.path}
            delta.restore({f"shift.{n}": t for n, t in own.items()})
        parts.append(part)
    return parts
