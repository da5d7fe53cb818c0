"""He et al. 2023: updates as sums of Kronecker products of shared small matrices and low-rank ones of each layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import on_meta, spread, vit
from torch import nn
from transformers import ViTConfig, ViTModel
from weight_models import around, counts

import graftwork as gw

pytestmark = pytest.mark.system("kadaptation")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(d_in, d_out, moved=True, **options):
    torch.manual_seed(0)
    model = around(nn.Linear(d_in, d_out))
    adapter = gw.graft(model, gw.KAdaptation(at="/site/", **{"update_dropout": 0.0, **options}), head=False)
    if moved:
        spread(adapter)
    (delta,) = adapter.deltas()
    (slow,) = delta._slow
    return model, delta, slow


def change(model, delta):
    return (delta.weight(model.site.weight) - model.site.weight).detach()


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3)])
def test_kadaptation__the_sum_of_kronecker_products(ranks):
    """c (sum_i S_i (x) U_i V_i^T)^T, by torch.kron and by einsum; of rank t slow_rank fast_rank at most."""
    model, delta, slow = layer(24, 16, t=4, slow_rank=ranks[0], fast_rank=ranks[1], scale=1.5)
    s = slow.left @ slow.right.mT
    fast = delta.down @ delta.up.mT  # U V^T [t, in / t, out / t]
    assert s.shape == (4, 4, 4) and fast.shape == (4, 6, 4)
    kron = 1.5 * sum(torch.kron(s[i], fast[i]) for i in range(4)).T
    einsum = 1.5 * torch.einsum("ipq,iuv->qvpu", s, fast).reshape(16, 24)
    close(kron, einsum)
    close(change(model, delta), kron.detach(), 1e-4)
    x = torch.randn(5, 24)
    close(model(x), F.linear(x, model.site.weight + kron, model.site.bias + delta.shift), 1e-4)
    if ranks == (1, 1):
        assert torch.linalg.matrix_rank(change(model, delta), rtol=1e-5) == 4


def test_kadaptation__one_block_is_a_lora_of_rank_one():
    model, delta, slow = layer(7, 5, t=1, scale=3.0)
    s = (slow.left * slow.right).item()
    close(change(model, delta), (3.0 * s * torch.outer(delta.up[0, :, 0], delta.down[0, :, 0])).detach())


def test_kadaptation__everything_moves():
    """Two factors at zero would never move; here the fast ones and the slow ones all have gradients after the first step."""
    model, delta, slow = layer(24, 16, moved=False, t=4)
    x, target = torch.randn(8, 24), torch.randn(8, 16)
    base = F.linear(x, model.site.weight, model.site.bias)
    assert torch.equal(model(x), base)
    own = [delta.down, delta.up, slow.left, slow.right, delta._shift[0].value]
    optimiser = torch.optim.SGD(own, lr=1.0)
    moved = []
    for _ in range(2):
        optimiser.zero_grad()
        (model(x) - target).square().mean().backward()
        moved.append([bool(p.grad.any()) for p in own])
        optimiser.step()
    assert moved == [[True, False, False, False, True], [True] * 5]
    assert slow.left.abs().max() < 0.02 or moved[1][2]


def test_kadaptation__slow_weights_are_one_pair_for_each_role():
    model = vit()
    adapter = gw.graft(model, gw.KAdaptation(t=4), head=False)
    by_role = {}
    for site, delta in zip(adapter.sites, adapter.deltas(), strict=True):
        by_role.setdefault(site.role, set()).add(id(delta._slow[0]))
    assert {role: len(ids) for role, ids in by_role.items()} == {"q": 1, "v": 1}
    assert by_role["q"] != by_role["v"]
    shifts = {(site.layer, id(d._shift[0])) for site, d in zip(adapter.sites, adapter.deltas(), strict=True)}
    assert len(shifts) == 2  # one for the q and v of a layer


def test_kadaptation__dropout_of_entries_in_training_only():
    model, delta, _ = layer(24, 16, t=4, update_dropout=0.5)
    w = change(model, delta)
    x = torch.eye(24)
    base = F.linear(x, model.site.weight)
    close((model(x) - model.site.bias - delta.shift - base).T, w, 1e-4)
    model.train()
    edit = (model(x) - model.site.bias - delta.shift - base).T
    kept = edit.abs() > 1e-5
    assert 0.35 < kept.float().mean() < 0.65
    close(edit, torch.where(kept, 2 * w, 0.0), 1e-3)
    gw.merge(model)  # whole
    close(model.site.weight - (base.T), w, 1e-4)


def test_kadaptation__counts():
    """ViT-B/32: 12 (4 d + d) + 2 roles of 2 t^2; with the head of 57.55 classes on average the paper's 79,699."""
    config = ViTConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, patch_size=32
    )
    model = on_meta(lambda: ViTModel(config))
    assert counts(model, gw.KAdaptation()) == (50_176, 50_176)
    assert round(50_176 + 513 * 57.55) == 79_699
    assert counts(model, gw.KAdaptation(bias=False)) == (50_176 - 12 * 768,) * 2


def test_kadaptation__t_must_divide():
    with pytest.raises(gw.GraftError, match="does not divide"):
        layer(24, 16, t=5)


@pytest.mark.parametrize("k", [6, 12])
def test_kadaptation__intrinsic_dimension(k):
    """A task that only looks at k directions of the weight: a random subspace of k dimensions solves it, and no smaller one."""
    torch.manual_seed(0)
    looks, wanted = torch.randn(k, 12 * 10) / 120**0.5, torch.randn(k)

    def train(method):
        torch.manual_seed(1)
        model = around(nn.Linear(12, 10))
        adapter = gw.graft(model, method, head=False)
        (delta,) = adapter.deltas()
        optimiser = torch.optim.LBFGS(list(adapter.parameters()), max_iter=200, line_search_fn="strong_wolfe")

        def loss():
            return (
                (looks @ (delta.weight(model.site.weight) - model.site.weight.detach()).flatten() - wanted)
                .square()
                .sum()
            )

        def closure():
            optimiser.zero_grad()
            value = loss()
            value.backward()
            return value

        optimiser.step(closure)
        return 1 - (loss() / wanted.square().sum()).item()  # explained

    full = train(gw.LoRA(r=10, at="/site/"))
    assert full > 0.99
    grid = range(2, 21, 2)
    found = gw.intrinsic_dimension(lambda n: train(gw.Subspace(n, at="/site/")), full, grid, share=0.98)
    assert abs(found - k) <= 2
    with pytest.raises(gw.GraftError, match="2: 0"):
        gw.intrinsic_dimension(lambda n: 0.0, full, [2, 4])
