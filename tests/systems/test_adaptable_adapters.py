"""Moosavi et al. 2022: adapters with a learned activation, and a switch in every layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from adapter_models import bert, bert_of, closed_form, ids, spread, t5, vit
from torch.nn import functional as F

import graftwork as gw
from graftwork.methods.activation.forms.rational import Rational

pytestmark = pytest.mark.system("adaptable-adapters")


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def rational(a=None, b=None, init: str = "one") -> Rational:
    f = Rational(5, 4, init, torch.zeros(0))
    if a is not None:
        f.numerator.data, f.denominator.data = torch.tensor(a), torch.tensor(b)
    return f


def switched(adapter, *z: tuple[float, float]) -> None:
    """Set the switches, one for all or one for each layer."""
    for i, delta in enumerate(adapter.deltas()):
        delta.logits.data = torch.tensor(z[i % len(z)])


def test_adaptable_adapters__the_rational_function():
    x = torch.linspace(-3, 3, 101)
    assert torch.equal(rational([0.0, 1, 0, 0, 0, 0], [0.0] * 4)(x), x)
    assert (rational()(x) - 1).abs().max() < 1e-3
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, generator=generator), torch.randn(4, generator=generator)
    f = rational(a.tolist(), b.tolist())
    by_hand = sum(a[i] * x**i for i in range(6)) / (1 + sum((b[j] * x ** (j + 1)).abs() for j in range(4)))
    torch.testing.assert_close(f(x), by_hand, atol=1e-4, rtol=1e-4)
    wide = torch.linspace(-50, 50, 10_001)
    powers = sum(a[i].abs() * wide.abs() ** i for i in range(6))
    assert (f(wide).abs() <= powers * 1.001).all()  # the denominator is nowhere below one


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "tanh", "none"])
def test_adaptable_adapters__it_can_start_as_any_activation(name):
    x = torch.linspace(-3, 3, 101)
    function = {"none": lambda t: t, "tanh": torch.tanh}.get(name) or getattr(F, name)
    f = rational(init=name)
    assert (f(x) - function(x)).abs().max() < (0.12 if name == "relu" else 0.02)
    assert f.denominator.abs().min() > 0  # at zero it would have no gradient


def test_adaptable_adapters__evaluation_takes_one_of_the_two():
    model = bert()
    base = logits(model)
    adapter = gw.graft(model, gw.AdaptableAdapters(d=4), head=False)
    spread(adapter)
    switched(adapter, (5.0, -5.0))
    assert torch.equal(logits(model), base)
    switched(adapter, (-5.0, 5.0))
    out = logits(model)
    twin = bert()
    for layer, delta in zip(twin.bert.encoder.layer, adapter.deltas(), strict=True):

        def explicit(module, args, h, delta=delta):
            inner = delta.rational(h @ delta.down.T + delta.down_bias)
            return inner @ delta.up.T + delta.up_bias

        layer.output.dropout.register_forward_hook(explicit)
    torch.testing.assert_close(out, logits(twin), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, base, atol=1e-3)


def test_adaptable_adapters__a_branch_that_is_off_is_not_computed():
    model = bert()
    adapter = gw.graft(model, gw.AdaptableAdapters(d=4), head=False)
    spread(adapter)
    switched(adapter, (1.0, 0.0), (0.0, 1.0))
    calls = []
    for i, delta in enumerate(adapter.deltas()):
        delta.rational.register_forward_hook(lambda m, args, out, i=i: calls.append(i))
    first = logits(model)
    assert calls == [1] and torch.equal(logits(model), first)
    switched(adapter, (0.0, 1.0))  # a switch that is written to is asked again
    calls.clear()
    assert not torch.equal(logits(model), first) and calls == [0, 1]


def test_adaptable_adapters__cold_draws_are_one_hot_with_the_frequencies_of_the_softmax():
    model = bert(layers=1)
    adapter = gw.graft(model, gw.AdaptableAdapters(d=4, tau=1e-4), head=False)
    (delta,) = adapter.deltas()
    delta.logits.data = torch.tensor([0.3, 1.1])
    torch.manual_seed(0)
    with torch.no_grad():
        w = delta.weights(torch.zeros(10_000, 3, 32))
    assert w.shape == (10_000, 1, 1, 2)  # one draw for all tokens of an example
    assert ((w > 0.99) | (w < 0.01)).float().mean() > 0.999
    p = delta.logits.detach().softmax(0).double()
    seen = w.argmax(-1).flatten().bincount(minlength=2).double()
    chi = float(((seen - 10_000 * p) ** 2 / (10_000 * p)).sum())
    assert chi < 6.63  # the 99% point of one degree of freedom


@pytest.mark.parametrize("draw, shape", [("example", (6, 1, 1)), ("token", (6, 3, 1)), ("channel", (6, 3, 32))])
def test_adaptable_adapters__the_mixture_of_training(draw, shape):
    adapter = gw.graft(bert(layers=1), gw.AdaptableAdapters(d=4, draw=draw, tau=3.0), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    h = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(5)
    w = delta.weights(h)
    assert w.shape == (*shape, 2) and len(w[..., 0].unique()) > 0.95 * math.prod(shape)
    torch.testing.assert_close(w.sum(-1), torch.ones(shape))
    torch.manual_seed(5)
    torch.testing.assert_close(delta.train()(h, h), w[..., 0] * h + w[..., 1] * delta.adapter(h))


def test_adaptable_adapters__switches_learn_at_their_own_rates():
    model = bert()
    adapter = gw.graft(model, gw.AdaptableAdapters(d=4))
    model.train()
    model(ids(), labels=torch.tensor([0, 1])).loss.backward()
    for delta in adapter.parts[0].deltas.values():
        assert delta.logits.grad.any() and delta.rational.numerator.grad.any() and delta.rational.denominator.grad.any()
    groups = {round(g["lr"], 9): g["params"] for g in adapter.groups(1e-4)}
    assert set(groups) == {1e-4, 0.01, 0.05}
    assert {tuple(p.shape) for p in groups[0.05]} == {(2,)} and {tuple(p.shape) for p in groups[0.01]} == {(6,), (4,)}


@pytest.mark.parametrize("make, at, expected", [
    (lambda: bert(layers=4), "mlp", [("mlp", "0,2")]),
    (t5, "mlp", [("encoder.mlp", "0"), ("decoder.mlp", "0")]),
    (t5, "attn", [("encoder.self.attn", "0"), ("decoder.self.attn", "0,1")]),
    (vit, "block", [("block", "0")]),
])  # fmt: skip
def test_adaptable_adapters__focused_has_the_chosen_layers_only(make, at, expected):
    model = make()
    adapter = gw.graft(model, gw.AdaptableAdapters(d=4, at=at), "aa", head=False)
    switched(adapter, (-1.0, 1.0), (1.0, -1.0))
    methods = gw.focused(model, "aa")
    assert [(m.at, m.layers) for m in methods] == expected
    made = gw.graft(model, methods, "focused", head=False)
    on = [s.key for s in adapter.sites if adapter.parts[0].deltas[s.key].logits.argmax() == 1]
    assert sorted(s.key for s in made.sites) == sorted(on)
    d, m = made.sites[0].d, 4
    assert made.num_parameters == len(on) * (2 * d * m + m + d + 10)
    switched(adapter, (1.0, -1.0))
    with pytest.raises(gw.GraftError, match="switches are off"):
        gw.focused(model, "aa")
    with pytest.raises(gw.GraftError, match="no switches"):
        gw.focused(model, "focused")


def test_adaptable_adapters__without_a_switch_the_skip_is_there():
    adapter = gw.graft(bert(layers=1), gw.AdaptableAdapters(d=4, switch=False), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    h = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(delta(h, h), h + delta.adapter(h))


def test_adaptable_adapters__counts_prior_and_falling_temperature():
    assert closed_form(bert_of("base"), [gw.AdaptableAdapters()]) == 12 * (74_544 + 12)
    assert gw.graft(bert_of("base"), gw.AdaptableAdapters(), head=False).num_parameters == 12 * (74_544 + 12)
    model = bert()
    adapter = gw.graft(model, gw.AdaptableAdapters(prior=0.9, anneal=0.5, tau=1.0, tau_min=0.3), head=False)
    taus = []
    for i in range(4):
        gw.step(model, i / 4)
        taus.append({round(d.tau, 6) for d in adapter.deltas()})
    assert taus == [{round(max(0.3, math.exp(-0.5 * t)), 6)} for t in (1, 2, 3, 4)]
    for delta in adapter.deltas():
        torch.testing.assert_close(delta.logits.softmax(0), torch.tensor([0.1, 0.9]))


def test_adaptable_adapters__files_copies_and_graphs(tmp_path):
    model = bert()
    adapter = gw.graft(model, gw.AdaptableAdapters(d=4), "aa", head=False)
    spread(adapter)
    switched(adapter, (-1.0, 1.0), (1.0, -1.0))
    out = logits(model)
    gw.save(model, "aa", tmp_path)
    twin = bert()
    gw.load(twin, tmp_path)
    assert torch.equal(logits(twin), out) and torch.equal(logits(copy.deepcopy(model)), out)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled), out)


def test_adaptable_adapters__what_makes_no_sense_is_refused():
    for how in ({"prior": 1.0}, {"tau": 0.0}, {"draw": "batch"}, {"rational": "sine"}):
        with pytest.raises(gw.GraftError, match=next(iter(how))):
            gw.AdaptableAdapters(**how)
