"""Gao et al. 2024: LoRA experts, the k best of them for each token, and more of them in higher layers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from adapter_models import closed_form, ids, llama, llama_of, spread, t5

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("mola")
SEVEN = "q, k, v, o, gate, up, down"


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def one_linear(**options):
    """MoLA's mixture on one linear layer: (model, its delta)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))
    (method,) = gw.MoLA(r=2, alpha=6.0, at="/^0$/", **{"dropout": 0.0} | options)
    spread(gw.graft(model, method, head=False))
    return model, next(gw.adapters(model)["default"].deltas())


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(0))


def test_mola__starts_as_the_backbone_for_any_router():
    model = llama()
    base = logits(model)
    adapter = gw.graft(model, gw.MoLA(experts=(2, 3)), head=False)
    for name, p in adapter.named_parameters():
        if name.endswith("router.weight"):
            assert (
                0.5 / 32**0.5 < p.detach().abs().max() <= 1 / 32**0.5 or p.shape[-1] == 64
            )  # kaiming-uniform, a = sqrt 5
            p.data *= 40
    assert torch.equal(logits(model), base)


# -- 1. one expert, and all of them


def test_mola__one_expert_is_lora():
    outputs = []
    for method in (
        gw.MoLA(r=3, experts=1, top_k=1),
        gw.MoLA(r=3, experts=(1, 1)),
        gw.LoRA(r=3, dropout=0.05, at=SEVEN),
    ):
        model = llama()
        spread(gw.graft(model, method, head=False, seed=0))
        outputs.append(logits(model))
        gw.merge(model)
        torch.testing.assert_close(logits(model), outputs[-1], atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[0], logits(llama()))


@pytest.mark.parametrize("n", [2, 3])
def test_mola__all_experts_with_equal_logits_are_their_mean(n):
    model, delta = one_linear(experts=n, top_k=n)
    delta.router.weight.data.zero_()
    x = x_of(4, 7)
    with torch.no_grad():
        mean = sum(e.up @ e.down for e in delta.experts) / n
        plain = F.linear(x, model[0]._parameters["weight"], model[0]._parameters["bias"])
        expected = model[2](torch.tanh(plain + 3.0 * x @ mean.T))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


# -- 2. the weights of what is chosen


def test_mola__weights_of_the_chosen_sum_to_one():
    _, delta = one_linear(experts=5, top_k=2)
    x = x_of(4, 7)
    w = delta.router(x)
    p = (x @ delta.router.weight.T).softmax(-1)
    assert ((w > 0).sum(-1) == 2).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(4, 7))
    best = p.topk(2, -1)
    torch.testing.assert_close(w.gather(-1, best.indices), best.values / best.values.sum(-1, keepdim=True))
    delta.router.weight.data.zero_()  # a tie is broken: never more than k
    assert ((delta.router(x) > 0).sum(-1) == 2).all()


def test_mola__one_token_trains_k_experts():
    model, delta = one_linear(experts=5, top_k=2)
    model(x_of(1, 1)).square().sum().backward()
    assert sum(bool(e.up.grad.any()) for e in delta.experts) == 2
    assert sum(bool(e.down.grad.any()) for e in delta.experts) == 2
    assert delta.router.weight.grad.any()


# -- 3. how many experts each layer has


@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (8, 6, 4, 2), (8, 2, 2, 8), (5, 5, 5, 5)])
def test_mola__the_schedule_is_spread_over_the_depth(shape):
    model = llama_of(64, 32, 4, 128)
    adapter = gw.graft(model, gw.MoLA(experts=shape), head=False)
    total: Counter[str] = Counter()
    for site in adapter.sites:
        delta = adapter.parts[0].deltas[site.key]
        assert len(delta.experts) == delta.router.weight.shape[0] == shape[site.layer // 8]
        total[site.role] += len(delta.experts)
    assert total == dict.fromkeys(SEVEN.split(", "), 160)


def test_mola__towers_of_an_encoder_decoder_each_have_the_schedule():
    adapter = gw.graft(t5(layers=2), gw.MoLA(experts=(1, 3)), head=False)
    for site in adapter.sites:
        delta = adapter.parts[0].deltas[site.key]
        assert len(getattr(delta, "experts", [delta])) == (1, 3)[site.layer]


def test_mola__parameters_of_llama_7b():
    model = llama_of(4096, 32, 32, 11008)
    r, d, ff = 8, 4096, 11008
    expected = 160 * (4 * (r * 2 * d + d) + 2 * (r * (d + ff) + d) + r * (ff + d) + ff)
    assert closed_form(model, gw.MoLA()) == expected == 105_635_840
    assert gw.graft(model, gw.MoLA(), head=False).num_parameters == expected


# -- 4. the balance loss


def test_mola__balance_of_a_uniform_and_of_a_collapsed_router():
    for n in (4, 6):
        model, delta = one_linear(experts=n, top_k=1, balance=1.0)
        delta.router.weight.data.zero_()
        model.train()(x_of(4, 7))
        torch.testing.assert_close(gw.auxiliary_loss(model), torch.tensor(1.0))
        x = x_of(4, 7).abs()
        delta.router.weight.data[2] = 1000.0
        model(x)
        torch.testing.assert_close(gw.auxiliary_loss(model), torch.tensor(float(n)))


def test_mola__balance_counts_every_choice_and_adds_up_over_the_weights():
    model, delta = one_linear(experts=4, top_k=2, balance=0.5)
    x = x_of(4, 7)
    model.train()(x)
    p = (x @ delta.router.weight.T).softmax(-1)
    share = F.one_hot(p.topk(2, -1).indices, 4).float().mean((0, 1, 2))
    torch.testing.assert_close(gw.auxiliary_loss(model), 0.5 * 4 * (share * p.mean((0, 1))).sum())
    whole = llama()
    adapter = gw.graft(whole, gw.MoLA(experts=2, balance=1.0), head=False)
    for name, p in adapter.named_parameters():
        if name.endswith("router.weight"):
            p.data.zero_()
    whole.train()(ids())
    torch.testing.assert_close(gw.auxiliary_loss(whole), torch.tensor(14.0))  # seven weights in each of two layers


# -- files and refusals


def test_mola__comes_back_from_a_file(tmp_path):
    model = llama()
    spread(gw.graft(model, gw.MoLA(experts=(2, 3)), "m", head=False))
    gw.save(model, "m", tmp_path / "m")
    other = llama()
    assert gw.load(other, tmp_path / "m").methods[0].experts == (2, 3)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(GraftError, match="merge"):
        gw.merge(model)


@pytest.mark.parametrize("experts", [0, (), (2, 0), (2, "3"), 2.5])
def test_mola__bad_numbers_of_experts_are_refused(experts):
    with pytest.raises(GraftError, match=r"(?s)experts=.*lowest layers"):
        gw.MoLA(experts=experts)


def test_mola__experts_by_depth_need_a_depth():
    with pytest.raises(GraftError, match="in no layer"):
        one_linear(experts=(2, 4))


def test_mola__rows_of_a_batch_have_their_own():
    model = llama()
    for name, std in (("a", 0.2), ("b", 0.4)):
        spread(gw.graft(model, gw.MoLA(r=2, experts=(2, 3)), name, head=False), std)
    apart = []
    for row, name in enumerate("ab"):
        with gw.using(model, name), torch.no_grad():
            apart.append(model(ids()[row : row + 1]).logits)
    with gw.using(model, gw.rows(["a", "b"])), torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, torch.cat(apart), atol=1e-4, rtol=1e-4)
