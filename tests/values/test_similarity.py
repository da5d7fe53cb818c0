"""gw.similarity, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graftwork as gw
from graftwork.core.errors import GraftError

sys.path.insert(0, str(Path(__file__).parent.parent / "systems"))  # for its backbones

from adapter_models import bert
from value_models import by_formula, change, keys, randomly


def test_the_cosine_of_the_dense_changes() -> None:
    model = bert()
    randomly(model, gw.LoRA(r=2, alpha=3.0, at="q, v, up"), "a", 1)
    randomly(model, gw.LoRA(r=5, alpha=7.0, rslora=True, at="q, up"), "b", 2)
    randomly(model, [gw.IA3(at="q, k"), gw.LNTuning()], "c", 3, std=0.1, around=True)
    for one, other in (("a", "b"), ("b", "a"), ("a", "c")):
        sites = keys(model, one, other)
        flat = {n: torch.cat([change(model, n, key).flatten() for key in sites]) for n in (one, other)}
        biases = 0.0  # of c: the biases that IA3 scales, and the norms
        if other == "c":
            gw.activate(model, None)
            before = {n: p.detach().double().clone() for n, p in model.named_parameters() if "graft" not in n}
            gw.activate(model, "c")
            gw.merge(model)
            after = {n: p.detach().double() for n, p in model.named_parameters() if "graft" not in n}
            biases = sum(float((after[n] - p).square().sum()) for n, p in before.items() if p.dim() == 1)
            gw.unmerge(model)
            sites = [key for key in sites if ":norm" not in key]
            flat = {n: torch.cat([change(model, n, key).flatten() for key in sites]) for n in (one, other)}
        size = float(flat[one].norm()) * (float(flat[other].square().sum()) + biases) ** 0.5
        wanted = float(flat[one] @ flat[other]) / size
        assert gw.similarity(model, one, other).cosine == pytest.approx(wanted, abs=1e-5)
    found = gw.similarity(model, "a", "b")
    assert found.sites.keys() == set(keys(model, "b"))
    for key, value in found.sites.items():
        a, b = (by_formula(model, n, key) for n in "ab")
        assert value == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.floats(-4, 4).filter(lambda f: abs(f) > 1e-3), st.integers(0, 99))
def test_itself_multiples_and_other_factors(factor: float, seed: int) -> None:
    model = bert(layers=1)
    randomly(model, gw.LoRA(r=3), "a", seed)
    gw.scale(model, "b", "a", factor)
    assert gw.similarity(model, "a", "a").cosine == pytest.approx(1)
    assert gw.similarity(model, "a", "b").cosine == pytest.approx(1 if factor > 0 else -1)
    m = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)) + 4 * torch.eye(3)
    for delta in gw.adapters(model)["b"].deltas():
        delta.down.data, delta.up.data = m @ delta.down.data, delta.up.data @ m.inverse()
    assert abs(gw.similarity(model, "a", "b").cosine) == pytest.approx(1, abs=1e-4)


def test_nothing_in_common_and_bad_input() -> None:
    model = bert()
    randomly(model, gw.LoRA(r=2, at="q"), "a", 1)
    randomly(model, gw.LoRA(r=2, at="v"), "b", 2)
    gw.graft(model, gw.LoRA(r=2), "fresh", head=False)
    randomly(model, gw.Bottleneck(d=4), "soft", 3)
    gw.graft(model, gw.Full(), "head", head=False)
    assert gw.similarity(model, "a", "b").cosine == 0
    assert gw.similarity(model, "a", "fresh").cosine == 0  # it changes nothing
    for pair, text in (
        (("a", "soft"), "changes activations"),
        (("a", "x"), "the adapter 'x'"),
        (("head", "head"), "nothing but heads"),
    ):
        with pytest.raises(GraftError, match=text):
            gw.similarity(model, *pair)
