"""Ostapenko et al. 2024: prototypes of LoRAs and clusters of them. (The routing by prototypes is an expression.)"""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert
from value_models import by_formula, change, keys, randomly, relative

import graftwork as gw
from graftwork.core.errors import GraftError

arrow = pytest.mark.system("arrow-mbc")


@arrow
def test_arrow_mbc__a_prototype_is_the_top_right_singular_vector():
    model = bert()
    randomly(model, gw.LoRA(r=4, alpha=3.0, at="q, up, down"), "a", 1)
    found = gw.prototypes(model, "a")
    assert found.keys() == set(keys(model, "a"))
    for key, p in found.items():
        v = torch.linalg.svd(by_formula(model, "a", key)).Vh[0]
        assert float((p @ v).abs()) == pytest.approx(1, abs=1e-6)
        assert float(p.norm()) == pytest.approx(1)
        assert float(p[p.abs().argmax()]) > 0
    # whatever the factors, and the scale
    m = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    for delta in gw.adapters(model)["a"].deltas():
        delta.down.data, delta.up.data = m @ delta.down.data, 2 * delta.up.data @ m.inverse()
    for key, p in gw.prototypes(model, "a").items():
        torch.testing.assert_close(p, found[key], atol=1e-4, rtol=1e-4)


@arrow
def test_arrow_mbc__uniform_mu_can_be_merged():
    """What routing becomes for top_k = E and an infinite temperature."""
    model = bert()
    for seed, name in enumerate("abc", 1):
        randomly(model, gw.LoRA(r=seed, alpha=3.0), name, seed)
    gw.combine(model, "mu", dict.fromkeys("abc", 1 / 3))
    for key in keys(model, "a"):
        wanted = sum(by_formula(model, n, key) for n in "abc") / 3
        assert relative(change(model, "mu", key), wanted) < 1e-5


@arrow
@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_arrow_mbc__planted_groups_are_recovered(quantile):
    model = bert()
    g = torch.Generator().manual_seed(0)
    centres, planted = [], {0: [], 1: []}
    for i in range(10):
        adapter = gw.graft(model, gw.LoRA(r=3), f"task{i}", head=False)
        group = i % 2
        planted[group].append(adapter.name)
        if i < 2:
            centres.append([torch.randn(p.shape, generator=g) for p in adapter.parameters()])
        for p, centre in zip(adapter.parameters(), centres[group], strict=True):
            p.data = centre + 0.5 * torch.randn(p.shape, generator=g)
    names = [f"task{i}" for i in range(10)]
    found = gw.clusters(model, names, k=2, quantile=quantile)
    assert sorted(map(sorted, found)) == sorted(planted.values())
    assert gw.clusters(model, names, k=2, quantile=quantile) == found
    with pytest.raises(GraftError, match="at least k names"):
        gw.clusters(model, names[:2], k=3)
    randomly(model, gw.LoRA(r=4), "other", 1)
    with pytest.raises(GraftError, match="is lora"):
        gw.clusters(model, [*names, "other"], k=2)
