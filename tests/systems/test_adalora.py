"""Zhang et al. 2023: a low-rank update in SVD form whose rank is shared out among all matrices while it is trained."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from adapter_models import bert, ids, llama, spread
from safetensors.torch import load_file
from torch import nn
from weight_models import around, counts, deberta_v3_base, gpt2, mixtral

import graftwork as gw

pytestmark = pytest.mark.system("adalora")
SIX = "q, k, v, o, up, down"


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def train(model, adapter, steps, total, start=0, lr=1e-2, after=None):
    """Steps `start` to `start + steps` of `total`: the task is to bring the logits to fixed random ones."""
    x = ids()
    with torch.no_grad():
        target = torch.randn(model(x).logits.shape, generator=torch.Generator().manual_seed(4))
    optimiser = torch.optim.SGD(adapter.parameters(), lr=lr)
    for t in range(start + 1, start + steps + 1):
        optimiser.zero_grad()
        loss = (model(x).logits - target).square().mean() + gw.auxiliary_loss(model)
        loss.backward()
        optimiser.step()
        gw.step(model, t / total)
        if after is not None:
            after(t)


def left(adapter):
    return sum(int((d.values != 0).sum()) for d in adapter.deltas())


def test_adalora__budget():
    method = gw.AdaLoRA(init_r=12, target_r=8, t_init=0.1, t_final=0.3)
    total = 1000
    budgets = [method.budget(6, t / total) for t in range(total + 1)]
    assert budgets[:101] == [72] * 101
    assert budgets[700:] == [48] * 301
    assert all(a >= b for a, b in pairwise(budgets))
    for t in (150, 300, 550, 699):
        assert budgets[t] == int((72 - 48) * (1 - (t - 100) / (1000 - 300 - 100)) ** 3 + 48)
    assert budgets[110] < 72
    # half-way the cubic is a whole number, which rounding must not push below: (4 (6 - 2)) / 8 + 4 * 2
    assert gw.AdaLoRA(init_r=6, target_r=2, t_init=0.1, t_final=0.3).budget(4, 40 / 100) == 10


def test_adalora__number_left_follows_the_budget():
    model = bert()
    method = gw.AdaLoRA(init_r=6, target_r=2, t_init=0.1, t_final=0.4, every=5)
    adapter = gw.graft(model, method, head=False, seed=0)
    matrices, seen = len(adapter.sites), []

    def check(t):
        n = left(adapter)
        if t > 10 and (t % 5 == 0 or t > 60):
            seen.append(n)
            assert n <= method.budget(matrices, t / 100)

    train(model, adapter, 100, 100, after=check)
    assert seen[0] > seen[-1] == 2 * matrices
    ranks = {int((d.values != 0).sum()) for d in adapter.deltas()}
    assert len(ranks) > 1  # the budget is shared out unevenly
    frozen = [d.gone.clone() for d in adapter.deltas()]
    assert sum(int((~g).sum()) for g in frozen) == 2 * matrices


def test_adalora__scores_are_smoothed_sensitivity_times_uncertainty():
    torch.manual_seed(0)
    method = gw.AdaLoRA(init_r=3, target_r=1, at="linear", beta1=0.8, beta2=0.6)
    model = around(nn.Linear(5, 4))
    adapter = gw.graft(model, method, head=False)
    (delta,) = adapter.deltas()
    mean = {n: torch.zeros_like(p) for n, p in delta.named_parameters()}
    spread_ = {n: torch.zeros_like(p) for n, p in delta.named_parameters()}
    for t in range(4):
        for n, p in delta.named_parameters():
            p.data.normal_()
            p.grad = torch.randn_like(p)
            now = (p * p.grad).abs().detach()
            mean[n] = 0.8 * mean[n] + 0.2 * now
            spread_[n] = 0.6 * spread_[n] + 0.4 * (now - mean[n]).abs()
        gw.step(model, t / 1000)
    s = {n: mean[n] * spread_[n] for n in mean}
    expected = [s["values"][i] + s["down"][i].mean() + s["up"][:, i].mean() for i in range(3)]
    close(delta.scores(), torch.stack(expected), 1e-6)


def test_adalora__a_zeroed_value_comes_back():
    """Between two allocations a zeroed e_i has a gradient and moves again; after the last allocation it does not."""
    model = bert()
    method = gw.AdaLoRA(init_r=4, target_r=3, t_init=0.1, t_final=0.3, every=1000)
    adapter = gw.graft(model, method, head=False, seed=0)
    delta = next(adapter.deltas())
    train(model, adapter, 20, 100)
    with torch.no_grad():
        delta.values[1] = 0.0
        delta.down[1] *= 50
    train(model, adapter, 2, 100, start=20)
    assert delta.values[1] != 0
    train(model, adapter, 60, 100, start=22)
    gone = [d.gone for d in adapter.deltas()]
    assert any(bool(g.any()) for g in gone)
    train(model, adapter, 5, 100, start=82)
    for d, g in zip(adapter.deltas(), gone, strict=True):
        assert not d.values[g].any()
    pulled = [d.values.grad[g] for d, g in zip(adapter.deltas(), gone, strict=True) if g.any()]
    assert all(p.abs().max() > 0 for p in pulled)  # the gradient is there; the mask takes what it does


def test_adalora__scores_are_global():
    """A matrix that does not matter loses all its rank, another keeps all of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    method = gw.AdaLoRA(init_r=4, target_r=2, t_init=0.1, t_final=0.3, every=5, at="/^0|^1/")
    adapter = gw.graft(model, method, head=False)
    idle, busy = adapter.deltas()
    for t in range(1, 101):
        for delta, size in ((idle, 1e-6), (busy, 1.0)):
            for p in delta.parameters():
                p.data.normal_()
                p.grad = size * torch.randn_like(p)
        gw.step(model, t / 100)
    assert not idle.values.any()
    assert (busy.values != 0).all()


def test_adalora__unit_values_equal_lora():
    for make in (bert, gpt2):
        model, other, x = make(), make(), ids()
        ada = gw.graft(model, gw.AdaLoRA(init_r=4, target_r=2, gamma=0.0, at="q, v"), head=False)
        lora = gw.graft(other, gw.LoRA(r=4, alpha=16.0 * 4 / (4 + 1e-5)), head=False)
        for mine, theirs in zip(ada.deltas(), lora.deltas(), strict=True):
            nn.init.ones_(mine.values)
            theirs.down.data, theirs.up.data = mine.down.data, mine.up.data
        close(model(x).logits, other(x).logits)
        assert gw.auxiliary_loss(model) == 0.0


def test_adalora__auxiliary_loss_is_the_mean_distance_from_orthogonality():
    model = bert()
    adapter = gw.graft(model, gw.AdaLoRA(init_r=3, target_r=2, gamma=0.7), head=False)
    spread(adapter)
    norms = []
    for d in adapter.deltas():
        norms += [(d.down @ d.down.T - torch.eye(3)).norm(), (d.up.T @ d.up - torch.eye(3)).norm()]
    close(gw.auxiliary_loss(model), 0.7 * torch.stack(norms).mean())
    assert gw.auxiliary_loss(model).requires_grad


def test_adalora__a_file_holds_the_triplets_that_are_left(tmp_path):
    model, x = bert(), ids()
    adapter = gw.graft(
        model, gw.AdaLoRA(init_r=6, target_r=1, t_init=0.1, t_final=0.3, every=5), "a", head=False, seed=0
    )
    train(model, adapter, 100, 100)
    assert any(bool(d.gone.all()) for d in adapter.deltas())  # one matrix has rank 0
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    expected = sum(int((~d.gone).sum()) * (d.view.d_in + d.view.d_out + 1) for d in adapter.deltas())
    assert sum(t.numel() for t in stored.values() if t.is_floating_point()) == expected
    again = bert()
    loaded = gw.load(again, tmp_path / "a", trainable=True)
    close(again(x).logits, out, 1e-6)
    assert loaded.num_parameters == expected
    train(again, loaded, 2, 100, start=98)  # training on keeps the ranks
    assert loaded.num_parameters == expected


@pytest.mark.parametrize("at", [8, 30, 75])
def test_adalora__training_goes_on_to_the_bit(tmp_path, at):
    """In the warm-up, between allocations, after the last one: a resumed run is the uninterrupted one."""
    method = gw.AdaLoRA(init_r=4, target_r=2, t_init=0.1, t_final=0.3, every=7)
    model = bert()
    adapter = gw.graft(model, method, "a", head=False, seed=0)
    train(model, adapter, at, 100)
    gw.save(model, "a", tmp_path / "a", resume=True)
    train(model, adapter, 25, 100, start=at)
    again = bert()
    loaded = gw.load(again, tmp_path / "a", trainable=True)
    train(again, loaded, 25, 100, start=at)
    for a, b in zip(adapter.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [bert, llama, gpt2, mixtral])
def test_adalora__identity_and_merge(make):
    model, x = make(), ids()
    before = model(x).logits
    at = "expert.gate_up, expert.down" if make is mixtral else SIX
    adapter = gw.graft(model, gw.AdaLoRA(init_r=4, target_r=2, at=at), head=False)
    close(model(x).logits, before, 1e-6)
    model(x).logits.square().mean().backward()
    assert all(d.values.grad.abs().max() > 0 for d in adapter.deltas())
    assert all(not d.down.grad.any() for d in adapter.deltas())
    spread(adapter)
    with torch.no_grad():
        out = model(x).logits
        gw.merge(model)
        close(model(x).logits, out, 1e-4)


def test_adalora__experts_share_the_budget():
    model = mixtral()
    method = gw.AdaLoRA(init_r=4, target_r=2, t_init=0.1, t_final=0.3, every=5, at="expert.gate_up, expert.down")
    adapter = gw.graft(model, method, head=False, seed=0)
    train(model, adapter, 100, 100)
    assert left(adapter) <= 2 * 8


def test_adalora__impossible_settings_are_refused():
    with pytest.raises(gw.GraftError, match="target_r"):
        gw.AdaLoRA(init_r=2, target_r=3)
    with pytest.raises(gw.GraftError, match="t_final"):
        gw.AdaLoRA(t_init=0.5, t_final=0.5)


def test_adalora__counts():
    """The paper's budgets on DeBERTa-v3-base, as LoRA of the same rank, and the triplets' own formula."""
    model = deberta_v3_base()
    assert counts(model, gw.LoRA(r=8, at=SIX)) == (1_327_104, 1_327_104)
    assert counts(model, gw.LoRA(r=2, at=SIX)) == (331_776, 331_776)
    expected = 12 * 12 * (4 * (768 + 768 + 1) + 2 * (768 + 3072 + 1))
    assert counts(model, gw.AdaLoRA()) == (expected, expected)
