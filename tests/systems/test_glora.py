"""Chavan et al. 2023: five support tensors, a supernet of all their kinds, and the search among them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from adapter_models import bert, closed_form, ids, spread, vit_base
from torch import nn
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.forms.views import KINDS, Choice

pytestmark = pytest.mark.system("glora")
ALL = [Choice(*kinds) for kinds in itertools.product(*KINDS.values())]
OFF = dict.fromkeys("abcde", "none")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(bias=True):
    torch.manual_seed(0)
    return around(nn.Linear(9, 13, bias=bias))


def only(**kinds):
    """A layer with these kinds alone, away from the start: (model, delta, x, its W, its b)."""
    model = layer()
    w, b = model.site.weight.detach().clone(), model.site.bias.detach().clone()
    adapter = gw.graft(model, gw.GLoRA(at="linear", **{**OFF, **kinds}), head=False)
    spread(adapter, 0.5)
    return model, next(adapter.deltas()).support, torch.randn(5, 9), w, b


@torch.no_grad()
def test_glora__b_alone_is_lora():
    model, t, x, _, _ = only(b="lora")
    other = layer()
    (lora,) = gw.graft(other, gw.LoRA(r=4, alpha=4.0, at="linear"), head=False).deltas()
    lora.down.data, lora.up.data = t["b_down"].data, t["b_up"].data
    close(model(x), other(x))


@torch.no_grad()
def test_glora__special_cases():
    model, t, x, w, b = only(a="vector", d="vector", e="vector")
    t["d"].data = t["a_up"].data[:, 0].clone()
    close(model(x), (1 + t["a_up"][:, 0]) * (x @ w.T + b) + t["e"])  # SSF: a scale and a shift of the output
    model, t, x, w, b = only(e="vector")
    other = layer()
    (fit,) = gw.graft(other, gw.BitFit(at="linear"), head=False).deltas()
    fit.shift["bias"].data = t["e"].data
    close(model(x), other(x))
    for kind in ("vector", "lora"):
        model, t, x, w, b = only(c=kind)
        c = t["c_up"][:, 0] if kind == "vector" else (t["c_up"] @ t["c_down"])[:, 0]
        close(model(x), layer()(x + c))  # a prompt: a constant beside the input


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_glora__merged_equals_unmerged_for_all_choices(bias):
    assert len(ALL) == 432
    model, x = layer(bias), torch.randn(5, 9)
    w, b = model.site.weight.clone(), model.site.bias.clone() if bias else None
    adapter = gw.graft(model, gw.GLoRA(r=3, supernet=True, at="linear"), "a", head=False)
    spread(adapter, 0.5)
    (delta,) = adapter.deltas()
    outs = []
    for choice in ALL:
        delta.choose(choice)
        gw.activate(model, "a")
        gw.keep_weights(model, False)
        fast = model(x)

        # the formula, written out
        def two(name, kind, t=delta.support):
            return {
                "lora": lambda: t[f"{name}_up"] @ t[f"{name}_down"],
                "vector": lambda: t[f"{name}_up"][:, :1],
                "constant": lambda: t[f"{name}_up"][0, 0],
                "none": lambda: torch.zeros(()),
            }[kind]()

        def one(name, kind, t=delta.support):
            return 0.0 if kind == "none" or name not in t else t[name] if kind == "vector" else t[name][0]

        own = torch.zeros(13) if b is None else b
        wc = 0.0 if choice.c == "none" else (w @ two("c", choice.c))[:, 0]
        bias_now = own + own * one("d", choice.d) + one("e", choice.e) + wc
        expected = x @ (w + w * two("a", choice.a) + two("b", choice.b)).T + bias_now
        close(fast, expected)
        gw.merge(model)
        close(model(x), expected)
        gw.unmerge(model)
        outs.append(fast)
    same = sum(torch.equal(outs[i], outs[j]) for i in range(0, 432, 40) for j in range(i))
    assert same == 0 if bias else same > 0  # without a bias D changes nothing


def test_glora__views_share_storage_and_ranks_nest():
    model, x = layer(), torch.randn(5, 9)
    adapter = gw.graft(model, gw.GLoRA(r=3, supernet=True, at="linear"), head=False)
    spread(adapter, 0.5)
    (delta,) = adapter.deltas()
    t = delta.support
    before = t.matrix("a", "lora").detach().clone(), t["a_up"].detach().clone()
    delta.choose(Choice("vector", "none", "none", "none", "none"))
    model(x).square().sum().backward()
    assert t["a_up"].grad[:, 0].all() and not t["a_up"].grad[:, 1:].any() and t["a_down"].grad is None
    torch.optim.SGD([t["a_up"]], lr=0.1).step()
    with torch.no_grad():
        moved = t["a_up"] - before[1]
        close(t.matrix("a", "lora") - before[0], moved[:, :1] @ t["a_down"][:1])
        for r in (1, 2, 3):
            close(t.matrix("b", "lora", r), t["b_up"][:, :r] @ t["b_down"][:r])
        for kind in ("vector", "constant"):
            assert t.matrix("a", kind).data_ptr() == t["a_up"].data_ptr()


def test_glora__a_training_pass_draws_each_weight_its_own():
    model = bert().train()
    adapter = gw.graft(model, gw.GLoRA(supernet=True), head=False)
    seen = []
    for _ in range(30):
        model(ids())
        seen.append([delta.drawn for delta in adapter.deltas()])
    assert all(len(set(row)) > 1 for row in seen)
    drawn = [choice for row in seen for choice in row]
    for i, kinds in enumerate(KINDS.values()):
        shares = [sum(choice[i] == kind for choice in drawn) / len(drawn) for kind in kinds]
        assert max(abs(share - 1 / len(kinds)) for share in shares) < 0.1
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, model(ids()).logits)


def test_glora__the_search_stays_within_the_limit_and_finds_the_best(tmp_path):
    model = bert()
    method = gw.GLoRA(r=2, supernet=True)
    adapter = gw.graft(model, method, "a", head=False)
    spread(adapter, 0.05)
    sites, limit, tried = adapter.sites, closed_form(bert(), [method]) // 3, []

    def score(m):
        choices = [delta.choice for delta in adapter.deltas()]
        tried.append(sum(method.chosen(s, c) for s, c in zip(sites, choices, strict=True)))
        return sum(c.e == "vector" for c in choices) - sum(c.d == "vector" for c in choices)

    best, size = gw.evolve(model, "a", score, limit=limit, population=20, select=5, generations=12)
    assert max(tried) <= limit and size <= limit
    assert best > 6  # of 12 weights; a random one has 0 on average
    choices = [delta.choice for delta in adapter.deltas()]
    assert sum(c.e == "vector" for c in choices) - sum(c.d == "vector" for c in choices) == best
    assert sum(method.chosen(s, c) for s, c in zip(sites, choices, strict=True)) == size
    # the closed formula is that of what is stored, and the file computes the same
    with torch.no_grad():
        out = model(ids()).logits
        gw.save(model, "a", tmp_path)
        again = bert()
        loaded = gw.load(again, tmp_path)
        assert loaded.num_parameters == size
        assert torch.equal(again(ids()).logits, out)
        plain = copy.deepcopy(again)
        gw.merge(plain)
        close(plain(ids()).logits, out)
    with pytest.raises(gw.GraftError, match="limit"):
        gw.evolve(model, "a", score, limit=1)
    assert [delta.choice for delta in adapter.deltas()] == choices
    gw.graft(model, gw.LoRA(), "b", head=False)
    with pytest.raises(gw.GraftError, match="no supernet"):
        gw.evolve(model, "b", score)


def test_glora__counts():
    model, (d, f, layers, r) = vit_base(), (768, 3072, 12, 4)
    shapes = [(d, d)] * 4 + [(d, f), (f, d)]  # (in, out) of q, k, v, o, up, down
    supernet = layers * sum(2 * r * (i + o) + r * (i + 1) + 2 * o for i, o in shapes)
    assert counts(model, gw.GLoRA(supernet=True)) == (supernet, supernet)
    vectors = layers * sum(o + 1 + i + 1 + o for i, o in shapes)
    assert counts(model, gw.GLoRA(a="vector", b="constant", c="vector", d="constant")) == (vectors, vectors)
    bare = layer(bias=False)  # no b, no D
    assert counts(bare, gw.GLoRA(at="linear", **{**OFF, "d": "vector", "e": "vector"})) == (13, 13)
    with pytest.raises(gw.GraftError, match="nothing to train"):
        gw.graft(bare, gw.GLoRA(at="linear", **{**OFF, "d": "vector"}), head=False)
