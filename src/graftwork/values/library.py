"""A library of LoRAs without its data: a prototype of each, and clusters of them.

Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (Arrow, MBC).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import GraftError
from ..grafting.graft import find
from ..grafting.root import body_of
from .parameters import check_alike
from .places import places


@torch.no_grad()
def prototypes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The input direction that an adapter answers most to, by site key: the top right singular vector of dW, [*batch, in],
    of length one. Its sign is arbitrary; here the largest entry is positive. It does not depend on how dW is factored.
    """
    found = places([find(model, name)], body_of(model), f"the prototypes of {name!r}")
    return {place.site.key: place.change(name).spectrum.v[..., 0, :] for place in found.matrices}


@torch.no_grad()
def clusters(
    model: nn.Module, names: Sequence[str], k: int = 10, *, quantile: float = 0.5, dims: int = 64, seed: int = 42
) -> list[list[str]]:
    """Like adapters in k groups by their tensors (model-based clustering).

    f_t: all tensors of the adapter t, entries below the q-quantile of |f_t| set to zero; cut to `dims` axes by singular
    values, rows of length one; then k-means over the rows of their cosines. Train one adapter on the data of each group.
    Raises GraftError where methods, sites or shapes differ.
    """
    from sklearn.cluster import KMeans

    asked = f"{k} clusters of {len(names)} adapters"
    if not 1 <= k <= len(names) or len(set(names)) < len(names) or not 0 <= quantile < 1 or dims < 1:
        raise GraftError(asked, f"names={list(names)}, quantile={quantile}", "give at least k names, each once")
    adapters = [find(model, n) for n in names]
    check_alike(adapters, asked)
    rows = []
    for adapter in adapters:
        flat = torch.cat([p.detach().cpu().double().flatten() for p in adapter.parameters()])
        rows.append(torch.where(flat.abs() >= _quantile(flat.abs(), quantile), flat, 0))
    u, s, _ = torch.linalg.svd(torch.stack(rows), full_matrices=False)
    short = F.normalize(u[:, :dims] * s[:dims], dim=1)
    labels = KMeans(k, n_init=10, random_state=seed).fit_predict((short @ short.T).numpy())
    groups: dict[int, list[str]] = {}
    for n, label in zip(names, labels.tolist(), strict=True):
        groups.setdefault(label, []).append(n)
    return list(groups.values())


def _quantile(values: Tensor, q: float) -> float:
    """The nearest value; torch.quantile takes 2^24 numbers at most."""
    i = round(q * (values.numel() - 1))
    return float(np.partition(values.numpy(), i)[i])
