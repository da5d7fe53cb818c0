"""Rückle et al. 2021: the lowest layers without adapters, in training and at inference. (Pruned fusion layers: with fusion.)"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from adapter_models import bert, ids, masked_bert, spread, t5

import graftwork as gw

pytestmark = pytest.mark.system("adapterdrop")
L = 4


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def entering(model) -> list[torch.Tensor]:
    """The hidden state that enters each layer, in a training pass."""
    found = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: found.append(args[0])) for layer in model.bert.encoder.layer
    ]
    model(ids(), labels=torch.tensor([0, 1])).loss.backward()
    for hook in hooks:
        hook.remove()
    return found


def draw(u: float, monkeypatch) -> None:
    """The next passes draw u."""
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.tensor(u))


# -- 1. no layer, and all


@pytest.mark.parametrize("robust", [False, True])
def test_adapterdrop__all_layers_dropped_is_the_backbone_and_none_the_adapter(robust):
    model = bert(layers=L)
    base = logits(model)
    methods = [gw.Bottleneck(d=4, at="mlp"), gw.LoRA(r=2)]
    made = gw.graft(model, [gw.AdapterDrop(of=m) for m in methods] if robust else methods, "a", head=False)
    spread(made)
    full = logits(model)
    outputs = []
    for n in range(1, L + 1):
        with gw.using(model, f'drop(a, layers="0-{n - 1}")'):
            outputs.append(logits(model))
    assert torch.equal(outputs[-1], base)
    assert all(not torch.allclose(one, other, atol=1e-4) for one, other in zip([full, *outputs], outputs, strict=False))
    plain = bert(layers=L)
    twin = gw.graft(plain, methods, "a", head=False)
    spread(twin)
    assert torch.equal(logits(plain), full)


# -- 2. training


@pytest.mark.parametrize("variant", ["specialised", "robust", "expression"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_adapterdrop__nothing_below_the_first_adapter_keeps_a_graph(variant, k, monkeypatch):
    model = bert(layers=L, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    one = gw.Bottleneck(d=4, at="mlp", layers=f"{k}--1" if variant == "specialised" else None)
    adapter = gw.graft(model, gw.AdapterDrop(of=one) if variant == "robust" else one, "a", head=False)
    spread(adapter)
    if variant == "expression" and k:
        gw.activate(model, f'drop(a, layers="0-{k - 1}")')
    if variant == "robust":
        draw((k + 0.5) / L, monkeypatch)
    model.train()
    states = entering(model)
    assert [s.requires_grad for s in states] == [i > k for i in range(L)]
    assert all((s.grad_fn is None) == (i <= k) for i, s in enumerate(states))
    for part in adapter.parts:
        for site in part.sites:
            trained = [p.grad is not None for p in part.deltas[site.key].parameters()]
            assert set(trained) == {site.layer >= k}
    if variant == "specialised":
        assert {site.layer for site in adapter.sites} == set(range(k, L))


def test_adapterdrop__a_dropped_layer_is_the_bare_backbone(monkeypatch):
    """A training pass with n = 2 is what the expression without the two lowest layers gives, for every kind of method."""
    model = masked_bert(layers=L)
    methods = [
        gw.Bottleneck(d=4, position="sum", at="mlp.norm"), gw.Prefix(length=3), gw.LoRA(r=2), gw.IA3(), gw.LNTuning(),
    ]  # fmt: skip
    spread(gw.graft(model, [gw.AdapterDrop(of=m) for m in methods], "a", head=False))
    with gw.using(model, 'drop(a, layers="0-1")'):
        dropped = logits(model)
    full = logits(model)
    model.train()
    for u, expected in ((0.6, dropped), (0.1, full)):
        draw(u, monkeypatch)
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-5)
    draw(0.6, monkeypatch)
    logits(model)
    torch.testing.assert_close(logits(model.eval()), full)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_adapterdrop__checkpointing_runs_with_the_same_draw(seed, reentrant):
    """The backbone's own dropout is on: the draw must not move what the blocks draw when they run again."""
    results = []
    for checkpointing in (False, True):
        model = bert(layers=L)
        adapter = gw.graft(model, gw.AdapterDrop(of=gw.Bottleneck(d=4, at="mlp")), head=False)
        spread(adapter)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model.train()
        torch.manual_seed(seed)
        model(ids(), labels=torch.tensor([0, 1])).loss.backward()
        results.append({n: p.grad for n, p in adapter.named_parameters() if p.grad is not None})
    one, other = results
    assert one.keys() == other.keys() and one
    for name, grad in one.items():
        torch.testing.assert_close(other[name], grad)


# -- 3. several tasks


def test_adapterdrop__tasks_share_the_layers_without_adapters():
    model = bert(layers=L)
    for seed, name in enumerate("abc"):
        spread(gw.graft(model, gw.AdapterDrop(of=gw.Bottleneck(d=4, at="mlp")), name), 0.2 + 0.1 * seed)
    texts = [f'drop({name}, layers="0-2")' for name in "abc"]
    apart = {}
    for text in texts:
        with gw.using(model, text):
            apart[text] = logits(model)
    calls: Counter[int] = Counter()
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.output.dense.register_forward_hook(lambda *a, i=i: calls.update([i]))
    with gw.using(model, " | ".join(texts)), torch.no_grad():
        together = model(ids())
    assert [calls[i] for i in range(L)] == [1, 1, 1, 3]
    assert len(together) == 3
    for out, expected in zip(together.values(), apart.values(), strict=True):
        assert torch.equal(out.logits, expected)


# -- 5. the draws of the robust variant


def test_adapterdrop__draws_are_uniform_and_one_for_all_sites():
    model = bert(layers=L)
    adapter = gw.graft(model, gw.AdapterDrop(of=gw.Bottleneck(d=2, at="self.attn, mlp")), head=False)
    spread(adapter)
    deltas = [(site.layer, adapter.parts[0].deltas[site.key].delta) for site in adapter.sites]
    active: set[tuple[int, int]] = set()
    for n, (layer, delta) in enumerate(deltas):
        own = type(delta).forward
        delta.__dict__["forward"] = lambda x, y, own=own, d=delta, at=(n, layer): (active.add(at), own(d, x, y))[1]
    model.train()
    torch.manual_seed(7)
    counts: Counter[int] = Counter()
    with torch.no_grad():
        for _ in range(1000):
            active.clear()
            model(torch.tensor([[5]]))
            layers = {layer for _, layer in active}
            lowest = min(layers)
            assert layers == set(range(lowest, L)) and len(active) == 2 * len(layers)  # both sub-layers alike
            counts[lowest] += 1
    assert set(counts) == set(range(L))
    chi = sum((counts[n] - 1000 / L) ** 2 / (1000 / L) for n in range(L))
    assert chi < 16.3  # three degrees of freedom, one in a thousand


def test_adapterdrop__towers_of_an_encoder_decoder_drop_the_same_share(monkeypatch):
    model = t5(layers=2)
    adapter = gw.graft(model, gw.AdapterDrop(of=gw.Bottleneck(d=2, at="mlp", init="bert")), head=False)
    draw(0.5, monkeypatch)
    model.train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    for part in adapter.parts:
        for site in part.sites:
            assert all((p.grad is not None) == (site.layer == 1) for p in part.deltas[site.key].parameters())


# -- what is stored, and what is refused


def test_adapterdrop__the_file_holds_what_the_method_inside_stores(tmp_path):
    model = bert(layers=L)
    methods = [gw.AdapterDrop(of=m, layers="1--1") for m in (gw.LoRA(r=2), gw.Prefix(length=3, reparam="mlp", mid=8))]
    adapter = gw.graft(model, methods, head=False)
    spread(adapter)
    gw.save(model, "default", tmp_path / "a")
    twin = bert(layers=L)
    loaded = gw.load(twin, tmp_path / "a")
    assert [str(m.of) for m in loaded.methods] == [str(m) for m in (gw.LoRA(r=2), gw.Prefix(length=3, mid=8))]
    torch.testing.assert_close(logits(twin), logits(model), atol=1e-6, rtol=1e-6)


def test_adapterdrop__sites_outside_of_layers():
    model = bert(layers=L)
    with pytest.raises(gw.GraftError, match="no site stands in a layer"):
        gw.graft(model, gw.AdapterDrop(of=gw.LoRA(r=2, at="embed")), head=False)
    with pytest.raises(gw.GraftError, match="of its own"):
        gw.AdapterDrop(of=gw.AdaLoRA())


def test_adapterdrop__merging_in_training_mode_takes_every_layer(monkeypatch):
    model = bert(layers=L)
    spread(gw.graft(model, gw.AdapterDrop(of=gw.LoRA(r=2)), head=False))
    full = logits(model)
    model.train()
    draw(0.99, monkeypatch)
    logits(model)
    gw.merge(model)
    torch.testing.assert_close(logits(model.eval()), full, atol=1e-5, rtol=1e-5)
