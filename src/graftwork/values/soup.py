"""Which adapters enter an average, and with what weights.

Chronopoulou et al. 2023, "AdapterSoup" (choice by the new domain's sentences); Wang et al. 2025, "Parameter-Efficient
Checkpoint Merging via Metrics-Weighted Averaging" (weights by loss or step).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import GraftError
from ..grafting.graft import find


def nearest_domains(domains: Mapping[str, Tensor], new: Tensor, top: int = 5) -> list[str]:
    """The `top` domains nearest to a new one, nearest first: by the cosine of the mean sentence vectors.

    domains: sentence vectors [n, d] by domain;  new: those of the new domain, [n, d], from the same encoder.
    """
    _check_domains(domains, new, top)
    mean = new.double().mean(0)
    score = {n: float(F.cosine_similarity(v.double().mean(0), mean, dim=0)) for n, v in domains.items()}
    return sorted(score, key=lambda n: (-score[n], n))[:top]


def clustered_domains(
    domains: Mapping[str, Tensor],
    new: Tensor,
    top: int = 5,
    components: int | None = None,
    dims: int = 50,
    seed: int = 0,
) -> list[str]:
    """The domains whose clusters the new sentences fall into, most sentences first, at most `top`.

    PCA to `dims` axes, then a Gaussian mixture of `components` (None: as many as domains) on all training sentences; a
    component stands for the domain of most of its members. domains, new: as for `nearest_domains`.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    _check_domains(domains, new, top)
    every = torch.cat([v.double() for v in domains.values()]).numpy()
    owner = [n for n, v in domains.items() for _ in range(len(v))]
    pca = PCA(min(dims, *every.shape), random_state=seed).fit(every)
    mixture = GaussianMixture(components or len(domains), random_state=seed).fit(pca.transform(every))
    members: dict[int, Counter[str]] = {}
    for component, domain in zip(mixture.predict(pca.transform(every)).tolist(), owner, strict=True):
        members.setdefault(component, Counter())[domain] += 1
    falls = Counter(mixture.predict(pca.transform(new.double().numpy())).tolist())
    votes: Counter[str] = Counter()
    for component, n in falls.items():
        if component in members:
            votes[members[component].most_common(1)[0][0]] += n
    return [domain for domain, _ in votes.most_common(top)]


def metric_weights(
    model: nn.Module, names: Sequence[str], metric: str = "loss", p: float = 1.0, form: str = "power"
) -> dict[str, float]:
    """Weights of checkpoints for `gw.average` or `gw.combine`, by what their metadata say of their training.

        w_i = m_i^p / sum_j m_j^p,   m = 1 / loss or m = step          (form "power")
        w = softmax(-p z) of the losses' z-scores, softmax(p z) of the steps'  (form "softmax")

    metric: "loss" or "step", a number in adapter.metadata, or what `graftwork train` wrote there (metrics, training).
    p: 0 is the uniform mean, a large one keeps the best only.
    Raises GraftError for a checkpoint without that number.  Source: arXiv 2504.18580, whose abstract leaves the form open.
    """
    asked = f"weights by {metric!r} of {', '.join(names)}"
    if metric not in ("loss", "step") or form not in ("power", "softmax") or not 0 <= p < math.inf or not names:
        raise GraftError(f"{asked}, p={p}, form={form!r}", "no such weights", "loss or step, power or softmax, p >= 0")
    values = []
    for n in names:
        value = _metric(find(model, n).metadata, metric)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            do = f"set gw.adapters(model)[{n!r}].metadata[{metric!r}] to a number above 0"
            raise GraftError(asked, f"{n!r} has {metric}={value!r}", do)
        values.append(float(value))
    sign = -1 if metric == "loss" else 1
    if form == "power":
        scores = [sign * p * math.log(v) for v in values]
    else:
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        scores = [sign * p * (v - mean) / spread if spread else 0.0 for v in values]
    powers = [math.exp(s - max(scores)) for s in scores]
    return {n: x / sum(powers) for n, x in zip(names, powers, strict=True)}


def _metric(metadata: Mapping[str, Any], metric: str) -> Any:
    inside, key = {"loss": ("metrics", "loss"), "step": ("training", "steps")}[metric]
    return metadata.get(metric, (metadata.get(inside) or {}).get(key))


def _check_domains(domains: Mapping[str, Tensor], new: Tensor, top: int) -> None:
    shapes = {n: list(v.shape) for n, v in domains.items()} | {"the new domain": list(new.shape)}
    if not domains or any(len(s) != 2 or not s[0] or s[1] != new.shape[-1] for s in shapes.values()):
        raise GraftError("choose domains", f"sentence vectors of shapes {shapes}", "give [n, d], from one encoder")
    if top < 1:
        raise GraftError("choose domains", f"top={top}", "give at least 1")
