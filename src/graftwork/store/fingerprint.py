"""Which backbone an adapter belongs to: a hash of its structure, and a probe of its numbers.

The structure is the names and shapes of the backbone's parameters. Heads and poolers are left out: they are
re-initialised for each task. The probe is 64 numbers, so that another checkpoint of the same architecture is told apart
while a half-precision copy of the same weights is not. Of weights that are held in few bits it says nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..grafting.root import body_of, is_grafted, root_of
from ..sites.body import Body

APART = ("head", "lm_head", "pooler")
COUNT = 64
# bfloat16 has 8 significant bits: one rounding moves a number by at most 2^-8 of itself
RELATIVE, ABSOLUTE = 2.0**-7, 1e-6


@dataclass(frozen=True)
class Fingerprint:
    """What tells a backbone from others.

    name: where the weights came from;  model: the class;  parameters: how many numbers;  structure: SHA-256 of names
    and shapes;  probe: some of the numbers, None where there are none (meta device).
    """

    name: str
    model: str
    parameters: int
    structure: str
    probe: tuple[float, ...] | None

    def differs(self, other: Fingerprint) -> str:
        """Why `other` is another backbone; the empty text if it is the same one."""
        if self.structure != other.structure:
            return "another structure"
        if self.probe is None or other.probe is None:
            return ""
        pairs = list(zip(self.probe, other.probe, strict=False))
        apart = sum(abs(a - b) > RELATIVE * max(abs(a), abs(b)) + ABSOLUTE for a, b in pairs)
        return f"other weights: {apart} of {len(pairs)} probed numbers differ" if apart else ""

    def __str__(self) -> str:
        some = "no values" if self.probe is None else " ".join(f"{v:.3g}" for v in self.probe[:3]) + " ..."
        size = f"{self.parameters:,} parameters"
        return f"{self.model} {self.name!r}, {size}, structure {self.structure[:12]}, weights {some}"

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        probe = None if self.probe is None else " ".join(f"{v:.5g}" for v in self.probe)
        return {
            "name": self.name,
            "class": self.model,
            "parameters": self.parameters,
            "structure": self.structure,
            "probe": probe,
        }


def from_json(data: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint that `to_json` wrote. ValueError, KeyError or TypeError for anything else."""
    probe = data["probe"]
    numbers = None if probe is None else tuple(float(v) for v in probe.split())
    if not isinstance(data["structure"], str) or not data["structure"]:
        raise ValueError("the structure is no text")
    return Fingerprint(str(data["name"]), str(data["class"]), int(data["parameters"]), data["structure"], numbers)


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of the backbone, adapters left out."""
    return body_of(model).once(of_body)


def of_body(body: Body) -> Fingerprint:
    """The fingerprint of a backbone that is read already: `body.once(of_body)`."""
    model = body.modules[""]
    apart = {site.path for site in body.anatomy.sites if site.role in APART}
    merged = _before_merging(model)
    every = [(name, merged.get(id(p), p)) for name, p in body.numbers.items()]
    frame = sorted((name, p) for name, p in every if name.rpartition(".")[0] not in apart) or sorted(every)
    text = "\n".join(f"{name} {list(p.shape)}" for name, p in frame)
    return Fingerprint(
        name=str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""),
        model=type(model).__name__,
        parameters=sum(p.numel() for _, p in frame),
        structure=hashlib.sha256(text.encode()).hexdigest(),
        probe=_probe(frame),
    )


def _before_merging(model: nn.Module) -> dict[int, Tensor]:
    """Parameters that merging replaced, by the id of what stands in their place now."""
    kept = root_of(model).kept if is_grafted(model) else []
    return {id(module._parameters[name]): old for module, name, old in kept if isinstance(old, Tensor)}


def _probe(body: list[tuple[str, Tensor]]) -> tuple[float, ...] | None:
    """Numbers from the first row of the matrices.

    Vectors are often all ones or zeros; and the process that holds the first shard of a sharded model has that row.
    """
    matrices = [(name, p) for name, p in body if p.dim() > 1 and p.is_floating_point()] or body
    values = []
    for i in range(COUNT):
        name, p = matrices[i * len(matrices) // COUNT]
        # a DTensor sharded by rows: its first shard; any other sharding gives None below
        local = p.to_local() if hasattr(p, "to_local") else p
        if local.is_meta or not local.numel() or local.shape[1:] != p.shape[1:]:
            return None
        row = local.detach()[0]
        draw = int.from_bytes(hashlib.sha256(f"{name}:{i}".encode()).digest()[:8], "big")
        for size in row.shape:
            row, draw = row[draw % size], draw // size
        values.append(row.to(torch.float32))
    return tuple(float(f"{float(v):.5g}") for v in torch.stack([v.cpu() for v in values]))
