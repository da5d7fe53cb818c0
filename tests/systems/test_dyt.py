"""Zhao et al. 2024: a dispatcher decides, token by token, whether the frozen feed-forward runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, gpt2, ids, images, llama, spread, t5, vit, vit_base
from torch.utils.flop_counter import FlopCounterMode
from weight_models import counts, mixtral

import graftwork as gw

pytestmark = pytest.mark.system("dyt")

TEXT = {"input_ids": ids()}
HOSTS = [
    (vit, {"pixel_values": images()}, lambda m: [layer.mlp.fc1 for layer in m.vit.layers]),
    (llama, TEXT, lambda m: [layer.mlp.up_proj for layer in m.model.layers]),
    (gpt2, TEXT, lambda m: [layer.mlp.c_fc for layer in m.transformer.h]),
    (t5, TEXT | {"decoder_input_ids": ids(seq=4)}, lambda m: [b.layer[1].DenseReluDense.wi for b in m.encoder.block]),
    (mixtral, TEXT, lambda m: [layer.mlp.gate for layer in m.model.layers]),
]
on_hosts = pytest.mark.parametrize(("make", "inputs", "firsts"), HOSTS, ids=lambda v: getattr(v, "__name__", ""))


def adapted(make=vit, **options):
    """A model with the method, its parameters away from their start, and the dispatchers near their threshold."""
    model = make()
    method = gw.DyT(**{"d": 6, "dropout": 0.0, **options})
    adapter = gw.graft(model, method, "a", head=False)
    spread(adapter)
    for delta in adapter.deltas():
        delta.bias.data.zero_()
    return model, adapter


class Seen:
    """What modules were given, rows flattened."""

    def __init__(self, modules):
        self.rows = []
        for m in modules:
            m.register_forward_pre_hook(lambda m, args: self.rows.append(args[0].detach().flatten(0, -2)))


def block(model, delta, x, masked):
    """One ViT block, written out: the feed-forward of all tokens times M."""
    layer = model.vit.layers[0]
    x = x + layer.attention(layer.layernorm_before(x))[0]
    a = delta.adapter
    edit = F.relu(x @ a.down.T + a.down_bias) @ a.up.T + a.up_bias
    m = (x @ delta.weight.T + delta.bias > 0).to(x.dtype)
    m[:, 0] = 1
    mlp = layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.layernorm_after(x))))
    return x + (m if masked else 1) * mlp + delta.method.scale * edit, m


@torch.no_grad()
def test_dyt__is_the_equation():
    model, adapter = adapted(scale=0.7)
    delta = next(adapter.deltas())
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    layer, seen = model.vit.layers[0], []
    handle = layer.mlp.fc1.register_forward_hook(lambda m, args, out: seen.append(len(args[0].flatten(0, -2))))
    model.vit.embeddings.forward = lambda *args, **kwargs: x
    out = model.vit(images(), output_hidden_states=True).hidden_states[1]
    handle.remove()
    gw.activate(model, None)
    expected, m = block(model, delta, x, masked=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert seen == [int(m.sum())]
    assert 3 < m.sum() < 15


@on_hosts
@torch.no_grad()
def test_dyt__gathered_tokens_equal_masked_ones_and_the_rest_is_not_computed(make, inputs, firsts):
    """In evaluation the feed-forward sees exactly sum M rows, the first of each row among them; a training pass masks."""
    model, adapter = adapted(make, stochastic=False)
    model.train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    masks, whole = [], Seen(firsts(model))
    for delta in adapter.deltas():
        if "decoder." not in delta.key or make is not t5:
            masks.append(delta)
    recorded = {}
    for delta in masks:
        of = delta.mask
        delta.mask = lambda x, always, of=of, key=delta.key: recorded.setdefault(key, of(x, always))
    masked = model(**inputs)[0]
    kept = {key: m.bool() for key, m in recorded.items()}
    model.eval()
    some = Seen(firsts(model))
    torch.testing.assert_close(model(**inputs)[0], masked, atol=1e-5, rtol=1e-5)
    rows = some.rows
    assert [len(r) for r in rows] == [int(m.sum()) for m in kept.values()]
    assert sum(map(len, rows)) < sum(map(len, whole.rows[: len(rows)]))
    for given, all_rows, m in zip(rows, whole.rows, kept.values(), strict=False):
        assert m[:, 0].all()
        torch.testing.assert_close(given, all_rows[m.flatten()], atol=1e-4, rtol=1e-4)


def test_dyt__complete_and_without_an_adapter_it_is_the_backbone():
    model, x = vit(), images()
    base = model(x).logits
    gw.graft(model, gw.DyT(target=1.0), "a", head=False)
    dynamic = model(x).logits
    assert (dynamic - base).abs().max() > 1e-3
    with gw.context(model, complete=True):
        complete = model(x).logits
        torch.testing.assert_close(complete, base, atol=0, rtol=0)
    labels = torch.tensor([0, 1])
    ce = F.cross_entropy(complete, labels)
    torch.testing.assert_close(gw.complete_loss(complete, complete, labels), ce)  # KL = 0, and CE_dyn is CE_full
    p, q = complete.softmax(-1), dynamic.softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(gw.complete_loss(dynamic, complete, labels), ce + kl)
    assert kl > 0


def test_dyt__the_whole_loss_trains_both_passes():
    model, x, labels = vit(), images(), torch.tensor([0, 1])
    adapter = gw.graft(model, gw.DyT(d=4), "a", head=False)
    spread(adapter, 0.1)
    model.train()
    torch.manual_seed(0)
    out = model(x, labels=labels)
    rate = gw.auxiliary_loss(model)
    with gw.context(model, complete=True):
        whole = model(x, labels=labels)
        torch.testing.assert_close(gw.auxiliary_loss(model), rate)  # what is complete says nothing of the rate
    (out.loss + rate + gw.complete_loss(out.logits, whole.logits, labels)).backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_dyt__straight_through():
    _, adapter = adapted(tau=2.0)
    delta = next(adapter.deltas())
    delta.train()
    x, always = torch.randn(64, 9, 32), torch.zeros(64, 9, dtype=torch.bool)
    torch.manual_seed(5)
    m = delta.mask(x, always)
    assert set(m.detach().unique().tolist()) == {0.0, 1.0}
    torch.manual_seed(5)
    logit = (x @ delta.weight.T + delta.bias)[..., 0]
    gumbels = [-torch.empty_like(logit).exponential_().log() for _ in range(2)]
    soft = ((logit + gumbels[0] - gumbels[1]) / 2.0).sigmoid()
    assert torch.equal(m.detach().bool(), soft > 0.5)
    pull = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((m * pull).sum(), [delta.weight, delta.bias])
    expected = torch.autograd.grad((soft * pull).sum(), [delta.weight, delta.bias])
    torch.testing.assert_close(found, expected)
    assert delta.mask(x, ~always).min() == 1


@pytest.mark.parametrize(("bias", "up"), [(6.0, True), (-6.0, False)])
def test_dyt__the_rate_is_pulled_to_its_target_from_both_sides(bias, up):
    model, adapter = adapted(target=0.4, stochastic=True)
    deltas = list(adapter.deltas())
    for delta in deltas:
        delta.bias.data.fill_(bias)
    model.train()
    torch.manual_seed(0)
    model(images())
    means = list(deltas[0]._rates[0].of.values())
    loss = gw.auxiliary_loss(model)
    torch.testing.assert_close(loss, 2.0 * (torch.stack(means).mean() - 0.4).square())
    loss.backward()
    assert all((delta.bias.grad > 0).all() == up and (delta.bias.grad != 0).all() for delta in deltas)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.3)
    rates = []
    for _ in range(60):
        model(images(batch=16))
        optimizer.zero_grad()
        gw.auxiliary_loss(model).backward()
        optimizer.step()
        rates.append(torch.stack(list(deltas[0]._rates[0].of.values())).mean().item())
    assert sum(rates[-20:]) / 20 == pytest.approx(0.4, abs=0.1)


def test_dyt__evaluation_draws_nothing():
    model, _ = adapted()
    assert torch.equal(model(images()).logits, model(images()).logits)
    model.train()
    torch.manual_seed(0)
    first = model(images()).logits
    assert not torch.equal(model(images()).logits, first)


@torch.no_grad()
def test_dyt__floating_point_operations_are_saved():
    """Of a feed-forward's 2 * 2 * d * 4d operations a token, only those of the kept tokens are counted."""

    def flops(model, x):
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    model, _ = adapted()
    x, seen = images(8), Seen([layer.mlp.fc1 for layer in model.vit.layers])
    total = flops(model, x)
    kept = sum(map(len, seen.rows))
    with gw.context(model, complete=True):
        complete = flops(model, x)
    tokens = 2 * 8 * 5
    assert kept < tokens
    dispatcher = 2 * 32 * tokens
    assert complete - total + dispatcher == (tokens - kept) * 2 * 2 * 32 * 64


def test_dyt__stacked_dispatchers_keep_the_first_token_of_every_row():
    model = vit()
    for name, bias in (("one", -50.0), ("two", 50.0)):
        adapter = gw.graft(model, gw.DyT(d=3), name, head=False)
        for delta in adapter.deltas():
            delta.bias.data.fill_(bias)
    gw.activate(model, "one >> two")
    seen = Seen([layer.mlp.fc1 for layer in model.vit.layers])
    with torch.no_grad():
        model(images(3))
    assert [len(rows) for rows in seen.rows] == [3, 3]


def test_dyt__parameters():
    made, said = counts(vit_base(), gw.DyT())
    assert made == said == 12 * (2 * 64 * 768 + 64 + 768 + 769)
    made, said = counts(vit_base(), gw.DyT(d=8))  # as released for VTAB-1K
    assert made == said == 165_996


@pytest.mark.parametrize(
    ("make", "options", "what"),
    [
        (bert, {}, "no module that is a feed-forward"),
        (vit, {"at": "attn"}, "no module that is a feed-forward"),
        (vit, {"target": 1.5}, "target"),
        (vit, {"tau": 0.0}, "tau"),
        (vit, {"keep": -1}, "keep"),
    ],
)
def test_dyt__bad_input_is_refused(make, options, what):
    model = make()
    with pytest.raises(gw.GraftError, match=what):
        gw.graft(model, gw.DyT(**options), head=False)
    assert not gw.adapters(model)
