"""Chronopoulou et al. 2023: averages of adapters of any method, and which of them enter."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_models import bert, ids, llama
from value_models import randomly

import graftwork as gw
from graftwork.core.errors import GraftError

soup = pytest.mark.system("adaptersoup")


def tensors(model, name):
    return gw.adapters(model)[name].state_dict()


@soup
@pytest.mark.parametrize(
    "methods",
    [
        gw.Bottleneck(d=4, norm="before"),
        gw.Prefix(length=3),
        gw.VeRA(r=4),
        gw.DoRA(r=2),
        gw.Compacter(),
        gw.MAM(),
        [gw.LoRA(r=2), gw.BitFit()],
        gw.LoReFT(),
    ],
    ids=lambda m: str(getattr(m, "name", "several")),
)
def test_adaptersoup__copies_order_and_weights(methods):
    model, x = bert(), ids()
    for seed, name in enumerate("abc", 1):
        adapter = gw.graft(model, methods, name, head=False, seed=7)
        for p in adapter.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    for other in ("b1", "b2"):
        gw.average(model, other, ["b"])
    gw.average(model, "copies", ["b", "b1", "b2"])
    assert all(torch.equal(t, tensors(model, "b")[n]) for n, t in tensors(model, "copies").items())
    soups = []
    for i, order in enumerate(itertools.permutations("abc")):
        gw.average(model, f"soup{i}", list(order))
        soups.append(tensors(model, f"soup{i}"))
    for other in soups[1:]:
        assert all(torch.equal(t, other[n]) for n, t in soups[0].items())
    for n, t in soups[0].items():
        if t.is_floating_point():
            mean = sum(tensors(model, x)[n].double() for x in "abc") / 3
            torch.testing.assert_close(t.double(), mean, atol=1e-6, rtol=1e-6)
    # weights are divided by their sum
    gw.average(model, "weighted", {"a": 3.0, "b": 1.0})
    for n, t in tensors(model, "weighted").items():
        if t.is_floating_point():
            wanted = 0.75 * tensors(model, "a")[n].double() + 0.25 * tensors(model, "b")[n].double()
            torch.testing.assert_close(t.double(), wanted, atol=1e-6, rtol=1e-6)
    assert model(x).logits.isfinite().all()


@soup
def test_adaptersoup__other_shapes_and_other_backbones_are_refused(tmp_path):
    model = bert()
    randomly(model, gw.Bottleneck(d=4), "a", 1)
    randomly(model, gw.Bottleneck(d=5), "b", 2)
    randomly(model, gw.Bottleneck(d=4, at="mlp"), "c", 3)
    for other in "bc":
        with pytest.raises(GraftError):
            gw.average(model, "new", ["a", other])
    assert list(gw.adapters(model)) == ["a", "b", "c"]
    gw.save(model, "a", tmp_path / "a")
    torch.manual_seed(5)
    tuned = bert()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    for stranger in (tuned, llama(), bert(layers=3)):
        randomly(stranger, gw.Bottleneck(d=4), "own", 1)
        with pytest.raises(GraftError, match=r"other weights|another structure"):
            gw.load(stranger, tmp_path / "a")


@soup
@pytest.mark.parametrize(
    ("of", "text"),
    [
        ([], "not a list of adapters"),
        ("a", "not a list of adapters"),
        (["a", "a"], "twice"),
        (["a", "x"], "the adapter 'x'"),
        ({"a": 0.0}, "not all 0"),
        ({"a": 1.0, "b": -0.5}, "at least 0"),
        ({"a": float("nan")}, "finite number"),
    ],
)
def test_adaptersoup__bad_input(of, text):
    model = bert()
    randomly(model, gw.Bottleneck(d=4), "a", 1)
    randomly(model, gw.Bottleneck(d=4), "b", 2)
    with pytest.raises(GraftError, match=text):
        gw.average(model, "new", of)
    assert list(gw.adapters(model)) == ["a", "b"]
    assert gw.active(model) == "b"


def sentences(domains=6, n=40, d=12):
    """Sentence vectors of planted domains, some of them far apart and some near."""
    g = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(domains, d, generator=g)
    train = {f"domain {i}": centres[i] + torch.randn(n, d, generator=g) for i in range(domains)}
    return train, [centres[i] + torch.randn(n, d, generator=g) * 1.1 for i in range(domains)]


@soup
def test_adaptersoup__selection_ranks_the_own_domain_first():
    train, new = sentences()
    for i, vectors in enumerate(new):
        for choose in (gw.nearest_domains, gw.clustered_domains):
            chosen = choose(train, vectors, top=3)
            assert chosen[0] == f"domain {i}", choose
            assert len(chosen) <= 3
            assert choose(train, vectors, top=3) == chosen
            assert choose(dict(reversed(train.items())), vectors, top=1) == chosen[:1]
    # half of one domain and half of another: both come first
    mixed = torch.cat([new[1][:25], new[4][:15]])
    assert gw.clustered_domains(train, mixed, top=2) == ["domain 1", "domain 4"]
    assert set(gw.nearest_domains(train, mixed, top=2)) == {"domain 1", "domain 4"}
    with pytest.raises(GraftError, match="sentence vectors"):
        gw.nearest_domains(train, torch.zeros(3, 5))
    with pytest.raises(GraftError, match="top=0"):
        gw.clustered_domains(train, new[0], top=0)


@soup
def test_adaptersoup__one_pass_is_not_the_mean_of_passes_unless_the_adapter_is_linear():
    torch.manual_seed(0)
    h = torch.randn(4, 9, 32)
    for act, linear in (("relu", False), ("none", True)):
        model = bert()
        for seed, name in enumerate("ab", 1):
            randomly(model, gw.Bottleneck(d=4, act=act, at="mlp", layers="1"), name, seed)
        if linear:  # linear in U alone: one D for both
            for one, other in zip(*(gw.adapters(model)[n].deltas() for n in "ab"), strict=True):
                other.down.data, other.down_bias.data = one.down.data.clone(), one.down_bias.data.clone()
        gw.average(model, "soup", ["a", "b"])
        a, b, s = (next(iter(gw.adapters(model)[n].deltas())).branch(h) for n in ("a", "b", "soup"))
        difference = float((s - (a + b) / 2).abs().max())
        assert difference < 1e-6 if linear else difference > 0.05
