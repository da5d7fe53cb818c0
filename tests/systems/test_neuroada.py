"""Zhang et al. 2025: a few trained increments for every output neuron, at the places of its largest weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama, llama_of, spread
from torch import nn
from weight_models import around, counts, dense, gpt2, mixtral

import graftwork as gw

pytestmark = pytest.mark.system("neuroada")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [bert, llama, gpt2, mixtral])
@pytest.mark.parametrize("k", [1, 3])
def test_neuroada__every_row_changes_at_its_largest_weights(make, k):
    model = make()
    at = "expert.gate_up, expert.down" if make is mixtral else "linear"
    sites = [s for s in gw.anatomy(model).sites if s.role == "down" or s.role == "expert.down"]
    with torch.no_grad():  # a neuron whose weights are tiny: a budget shared by all rows would leave it out
        stored = sites[0].module._parameters[sites[0].weight.name]
        sites[0].weight.dense(stored)[..., 5, :] *= 1e-6
    adapter = gw.graft(model, gw.NeuroAda(k=k, at=at), head=False)
    spread(adapter)
    for key, delta in adapter.parts[0].deltas.items():
        w = dense(model, key)
        change = delta.weight(w) - w
        changed = delta.update() != 0
        assert (changed.sum(-1) == k).all()
        assert change.shape == w.shape
        largest = torch.zeros_like(changed).scatter(-1, w.abs().topk(k).indices, True)
        assert torch.equal(changed, largest)


@pytest.mark.parametrize("k", [1, 4, 20, 99])
@pytest.mark.parametrize("bias", [True, False])
def test_neuroada__gathering_equals_scattering(k, bias):
    model = around(nn.Linear(20, 12, bias=bias))
    adapter = gw.graft(model, gw.NeuroAda(k=k, at="linear"), head=False)
    (delta,) = adapter.deltas()
    assert delta.values.shape == (12, min(k, 20))
    spread(adapter)
    x, g = normal(3, 5, 20).requires_grad_(), normal(3, 5, 12, seed=1)
    y = model(x)
    g_x, g_v = torch.autograd.grad(y, (x, delta.values), g)
    v = delta.values.detach().clone().requires_grad_()
    w, index = model.site.weight.detach(), delta.index.long()
    scattered = w.flatten().scatter_add(0, (index + 20 * torch.arange(12)[:, None]).flatten(), v.flatten()).view(12, 20)
    expected = F.linear(x, scattered, model.site.bias)
    want_x, want_v = torch.autograd.grad(expected, (x, v), g)
    gathered = F.linear(x, w, model.site.bias) + (x[..., index] * v).sum(-1)
    for one, two in ((y, expected), (y, gathered), (g_x, want_x), (g_v, want_v)):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_neuroada__all_inputs_are_full_fine_tuning():
    x, target = normal(16, 6), normal(16, 4, seed=1)
    model, plain = around(nn.Linear(6, 4)), around(nn.Linear(6, 4))
    plain.load_state_dict(model.state_dict())
    adapter = gw.graft(model, gw.NeuroAda(k=6, at="linear"), head=False)
    pairs = ((model, list(adapter.parameters())), (plain, [plain.site.weight]))
    for net, parameters in pairs:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (net(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    assert (model(x) - F.linear(x, model.site.weight, model.site.bias)).abs().max() > 1e-2


def test_neuroada__an_optimiser_holds_two_numbers_for_each_increment():
    model = bert()
    adapter = gw.graft(model, gw.NeuroAda(k=2), head=False)
    optimizer = torch.optim.AdamW(adapter.parameters(), weight_decay=0.1)
    model(ids()).logits.square().mean().backward()
    optimizer.step()
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    assert held == 2 * 2 * sum(site.weight.d_out for site in adapter.sites)
    assert all(site.module.weight.grad is None for site in adapter.sites)


def test_neuroada__other_ways_to_select():
    model, made = around(nn.Linear(20, 12)), {}
    w = model.site.weight.detach()
    for select in ("smallest", "random"):
        (delta,) = gw.graft(model, gw.NeuroAda(k=3, select=select, at="linear"), select, head=False, seed=4).deltas()
        made[select] = delta.index.long()
        assert all(len(set(row)) == 3 for row in made[select].tolist())
    assert torch.equal(made["smallest"], (-w.abs()).topk(3).indices)
    assert not torch.equal(made["random"].sort().values, made["smallest"].sort().values)


def test_neuroada__gradients_select(tmp_path):
    x, target = normal(16, 20), normal(16, 12, seed=1)
    model = around(nn.Linear(20, 12))
    adapter = gw.graft(model, gw.NeuroAda(k=3, select="gradient", at="linear"), "a", head=False)
    (delta,) = adapter.deltas()
    with pytest.raises(gw.GraftError, match="calibrate"):
        model.train()(x)
    gw.calibrate(model, [(x[:8], target[:8]), (x[8:], target[8:])], lambda m, b: (m(b[0]) - b[1]).square().sum())
    w = model.site.weight.detach().clone().requires_grad_()
    (F.linear(x, w, model.site.bias) - target).square().sum().backward()
    assert torch.equal(delta.index.long().sort().values, w.grad.abs().topk(3).indices.sort().values)
    spread(adapter)
    gw.save(model, "a", tmp_path / "a")
    out = model(x)
    gw.remove(model, "a")
    gw.load(model, tmp_path / "a", trainable=True)
    assert torch.equal(model(x), out)


def test_neuroada__counts():
    """LLaMA-7B, all linear layers: 0.020% with k = 1, 0.404% with k = 20."""
    model = llama_of(4096, 32, 32, 11008)
    assert counts(model, gw.NeuroAda(k=1)) == (1_359_872, 1_359_872)
    assert counts(model, gw.NeuroAda(k=20))[0] == 20 * 1_359_872
    whole = sum(p.numel() for p in model.parameters())
    assert 1_359_872 / whole == pytest.approx(0.0202e-2, rel=0.01)
