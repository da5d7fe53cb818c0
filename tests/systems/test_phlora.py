"""PHLoRA 2025: a LoRA out of a checkpoint that was tuned as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_models import bert, ids, llama
from torch import nn
from value_models import by_formula, change, keys, randomly, relative, weights_of
from weight_models import around, dense, gpt2

import graftwork as gw
from graftwork.core.errors import GraftError
from graftwork.values.change import Change
from graftwork.values.extract import extract

phlora = pytest.mark.system("phlora")


def linear_sites(model):
    return [s for s in gw.anatomy(model).of("linear") if s.weight.is_matrix]


def moved(model, ranks, std=0.02, seed=0):
    """The model again, each linear weight moved by a matrix of a rank that `ranks` takes from its index."""
    tuned, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for i, site in enumerate(linear_sites(tuned)):
        out, into = site.weight.shape
        q = ranks(i)
        d = std * torch.randn(out, q, generator=g) @ torch.randn(q, into, generator=g)
        stored = site.module._parameters[site.param]
        stored.data = site.weight.restore(stored.data, site.weight.dense(stored.data) + d)
    return tuned


@phlora
@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_phlora__a_small_change_is_found_exactly(make):
    base, x = make(), ids()
    tuned = moved(base, lambda i: 3)
    made = extract(base, tuned, r=4)
    assert made.error < 1e-4
    assert not made.left
    gw.merge(base)
    for site in linear_sites(tuned):
        torch.testing.assert_close(dense(base, site.key), dense(tuned, site.key), atol=1e-5, rtol=1e-5)
    gw.unmerge(base)
    with torch.no_grad():
        torch.testing.assert_close(base(x).logits, tuned(x).logits, atol=1e-4, rtol=1e-4)
    # the rank that a share of 1 - 1e-9 takes is the planted one
    fits = gw.extract(base, tuned, "some", r=None, energy=1 - 1e-9).sites
    assert {fit.r for fit in fits} == {3}
    assert len(fits) == len(linear_sites(tuned))
    # a state dict says the same
    gw.extract(base, tuned.state_dict(), "dict", r=4)
    for n, t in gw.adapters(base)["extracted"].state_dict().items():
        assert torch.equal(t, gw.adapters(base)["dict"].state_dict()[n])


@phlora
def test_phlora__the_residual_is_the_rest_of_the_spectrum_and_no_pair_does_better():
    base = bert()
    tuned = copy.deepcopy(base)
    g = torch.Generator().manual_seed(0)
    for site in linear_sites(tuned):
        site.module.weight.data += 0.02 * torch.randn(site.module.weight.shape, generator=g)
    made = gw.extract(base, tuned, r=4)
    assert {fit.r for fit in made.sites} == {4}
    for fit in made.sites:
        d = (dense(tuned, fit.site) - dense(base, fit.site)).detach().double()
        s = torch.linalg.svdvals(d)
        left = float(s[4:].square().sum().sqrt())
        lost = float((d - by_formula(base, "extracted", fit.site)).norm())
        assert lost == pytest.approx(left, rel=1e-5)
        assert fit.error == pytest.approx(left / float(s.norm()), rel=1e-5)
        assert fit.energy == pytest.approx(float(s[:4].square().sum() / s.square().sum()), rel=1e-5)
        for seed in range(20):  # the best B for a random A, and the best A for a random B
            a = torch.randn(4, d.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert float((d - d @ torch.linalg.pinv(a) @ a).norm()) > left
            b = torch.randn(d.shape[0], 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert float((d - b @ torch.linalg.pinv(b) @ d).norm()) > left
        delta = next(p.deltas[fit.site] for p in gw.adapters(base)["extracted"].parts if fit.site in p.deltas)
        torch.testing.assert_close(delta.down.norm(dim=1), delta.up.norm(dim=0), atol=1e-6, rtol=1e-4)  # split evenly


@phlora
def test_phlora__a_merged_lora_comes_back():
    base, tuned = bert(), bert()
    randomly(tuned, gw.LoRA(r=3, alpha=2.0, at="q, v"), "a", 1)
    wanted = {key: by_formula(tuned, "a", key) for key in keys(tuned, "a")}
    gw.merge(tuned)
    made = gw.extract(base, tuned, r=3)
    # only what changed gets an adapter
    assert {fit.site for fit in made.sites} == set(wanted)
    for key, d in wanted.items():
        assert relative(change(base, "extracted", key), d) < 1e-4
    # from an adapter that is not merged, of any weight method: combine
    gw.unmerge(tuned)
    randomly(tuned, gw.VeRA(r=4, at="q, v"), "vera", 2)
    made = gw.combine(tuned, "as lora", {"vera": 1.0}, "svd", r=4)
    assert made.error < 1e-5
    for key in keys(tuned, "vera"):
        assert relative(change(tuned, "as lora", key), change(tuned, "vera", key)) < 1e-4


@phlora
def test_phlora__identical_checkpoints_give_zero():
    base, x = bert(), ids()
    with torch.no_grad():
        out = base(x).logits
        for energy in (None, 0.9):
            name = f"e{energy}"
            made = gw.extract(base, bert(), name, energy=energy)
            assert made.error == 0
            assert all(fit.energy == 1 for fit in made.sites)
            assert {fit.r for fit in made.sites} == {1}
            for key in keys(base, name):
                assert not by_formula(base, name, key).any()
            assert torch.equal(base(x).logits, out)


@phlora
def test_phlora__a_share_takes_other_ranks_at_other_sites():
    base = bert()
    tuned = moved(base, lambda i: 1 + i % 4)
    made = gw.extract(base, tuned, energy=1 - 1e-9)
    assert {f.site.split(":")[0]: f.r for f in made.sites} == {
        s.path: 1 + i % 4 for i, s in enumerate(linear_sites(base))
    }
    assert sorted(part.method.r for part in made.adapter.parts) == [1, 2, 3, 4]
    assert made.error < 1e-4
    some = gw.extract(base, tuned, "some", r=2, energy=1 - 1e-9)
    assert {f.r for f in some.sites} == {1, 2}


class Tied(nn.Module):
    """Two layers of one weight, a third with its own, and a head."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.classifier = nn.Linear(6, 2)

    def forward(self, x):
        return self.classifier(self.three(torch.tanh(self.two(torch.tanh(self.one(x))))))


@phlora
def test_phlora__a_tied_weight_is_taken_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    base, x = Tied().eval(), torch.randn(3, 6)
    tuned, again = copy.deepcopy(base), copy.deepcopy(base)
    tuned.one.weight.data += 0.3 * torch.randn(6, 2) @ torch.randn(2, 6)
    tuned.three.weight.data += 0.3 * torch.randn(6, 2) @ torch.randn(2, 6)
    decomposed = []
    plain = Change.spectrum.func
    monkeypatch.setattr(Change, "spectrum", property(lambda self: decomposed.append(1) or plain(self)))
    made = gw.extract(base, tuned, r=2)
    assert len(made.sites) == 3
    assert len(decomposed) == 2 * 2  # cut asks each of the two weights for its rank and its factors
    with torch.no_grad():
        torch.testing.assert_close(base(x), tuned(x), atol=1e-5, rtol=1e-5)
        assert made.adapter.num_parameters == 2 * 2 * (6 + 6)
        gw.save(base, "extracted", tmp_path / "a")
        gw.load(again, tmp_path / "a")
        assert torch.equal(again(x), base(x))
    untied = {n: p.clone() for n, p in tuned.state_dict().items()}
    untied["two.weight"] += 1
    with pytest.raises(GraftError, match="which the base shares"):
        gw.extract(base, untied, "other")


@phlora
def test_phlora__what_is_not_linear_is_reported_or_kept():
    base, x = bert(), ids()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.bert.encoder.layer[0].attention.self.query.weight += 0.1 * torch.randn(32, 1) @ torch.randn(1, 32)
        tuned.bert.encoder.layer[0].attention.self.query.bias += 0.5
        tuned.bert.encoder.layer[1].output.LayerNorm.weight *= 1.1
        tuned.bert.embeddings.word_embeddings.weight[5] += 1
        tuned.classifier.weight += 1
        tuned.classifier.bias += 1
    made = gw.extract(base, tuned, "linear", r=4)
    assert set(made.left) == {
        "bert.encoder.layer.0.attention.self.query.bias",
        "bert.encoder.layer.1.output.LayerNorm.weight",
        "bert.embeddings.word_embeddings.weight",
    }
    assert made.left["bert.encoder.layer.1.output.LayerNorm.weight"] == pytest.approx(0.1, rel=1e-3)
    assert [m.name for m in made.adapter.methods] == ["lora", "full"]  # the head is always kept
    whole = gw.extract(base, tuned, "all", r=4, rest=True)
    assert not whole.left
    with torch.no_grad():
        torch.testing.assert_close(base(x).logits, tuned(x).logits, atol=1e-4, rtol=1e-4)
    gw.merge(base)
    for n, p in weights_of(base).items():
        torch.testing.assert_close(p, dict(tuned.named_parameters())[n], atol=1e-5, rtol=1e-5)


@phlora
def test_phlora__convolutions():
    torch.manual_seed(0)
    base = around(nn.Conv2d(4, 6, 3))
    tuned = copy.deepcopy(base)
    tuned.site.weight.data += 0.1 * torch.randn(6, 4, 3, 3)
    x = torch.randn(2, 4, 8, 8)
    assert gw.extract(base, tuned, r=6).error < 1e-5
    torch.testing.assert_close(base(x), tuned(x), atol=1e-5, rtol=1e-5)


@phlora
def test_phlora__bad_input():
    base = bert()
    weights = weights_of(base)
    state = {n: p.clone() for n, p in bert().state_dict().items()}
    short = {n: p for n, p in state.items() if "query.bias" not in n}
    wide = state | {"classifier.weight": torch.zeros(3, 32)}
    broken = {n: p.clone() for n, p in state.items()}
    broken["bert.encoder.layer.0.attention.self.key.weight"][0, 0] = float("nan")
    for tuned, options, text in (
        (llama(), {}, "the tuned one lacks"),
        (bert(layers=3), {}, "the base lacks"),
        (short, {}, "lacks 'bert.encoder.layer.0.attention.self.query.bias', and 1 more"),
        (state | {"extra.weight": torch.zeros(1)}, {}, "the base lacks 'extra.weight'"),
        (wide, {}, r"'classifier.weight': \[2, 32\] in the base, \[3, 32\]"),
        (broken, {}, "not finite"),
        (state, {"r": 0}, "r=0"),
        (state, {"energy": 0.0}, "energy=0.0"),
        (state, {"at": "qu"}, "no role"),
    ):
        with pytest.raises(GraftError, match=text):
            gw.extract(base, tuned, **options)
    assert not gw.adapters(base)
    assert type(base).__name__ == "BertForSequenceClassification"
    assert all(torch.equal(weights[n], p) for n, p in weights_of(base).items())
