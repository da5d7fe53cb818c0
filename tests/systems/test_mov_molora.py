"""Zadouri et al. 2023: token-level soft mixtures of (IA)^3 vectors and of LoRA pairs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapter_models import closed_form, ids, llama, spread, t5, t5_base

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("mov-molora")


def logits(model, x=None):
    with torch.no_grad():
        return model(ids() if x is None else x).logits


def routers(adapter):
    return [p for name, p in adapter.named_parameters() if ".router." in name or "/router." in name]


def one_linear(**hyper):
    """A mixture on one rectangular Linear: (model, delta, base linear)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))
    adapter = gw.graft(model, gw.Mixture(at="/^0$/", **hyper), head=False)
    spread(adapter)
    return model, next(adapter.deltas()), model[0]


@pytest.mark.parametrize("name", ["mov", "molora"])
def test_mov_molora__starts_as_the_backbone_for_any_router(name):
    model = llama()
    base = logits(model)
    adapter = gw.graft(model, gw.parse_methods(f"{name}(experts=3)"), head=False)
    assert routers(adapter)
    for p in routers(adapter):
        p.data = 5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(model), base)


def test_mov_molora__one_expert_is_ia3_or_lora():
    for one, plain in (("mov(experts=1)", "ia3"), ("molora(experts=1, r=3)", "lora(r=3, at='q,k,v,o,up,gate,down')")):
        outputs = []
        for text in (one, plain):
            model = llama()
            spread(gw.graft(model, text, head=False, seed=0))
            outputs.append(logits(model))
            gw.merge(model)
            torch.testing.assert_close(logits(model), outputs[-1], atol=1e-4, rtol=1e-4)
        assert torch.equal(*outputs)


def test_mov_molora__p_sums_to_one_per_token_and_per_head():
    model = llama()
    adapter = gw.graft(model, gw.MoV(experts=3), head=False)
    spread(adapter, 1.0)
    for site in adapter.sites:
        router = adapter.parts[0].deltas[site.key].router
        d = site.d if site.role in "kv" else site.weight.d_in
        p = router(torch.randn(2, 5, d, generator=torch.Generator().manual_seed(0)))
        assert p.shape == ((2, 5, 2, 3) if site.role in "kv" else (2, 5, 3))  # two key-value heads
        torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]))
        assert (p[0, 0] - p[0, 1]).abs().max() > 1e-2
        if site.role in "kv":
            assert (p[0, 0, 0] - p[0, 0, 1]).abs().max() > 1e-3
    half = Router16(adapter)
    assert half.dtype == torch.bfloat16


def Router16(adapter):
    """The router's p for half-precision activations: computed in float32, given back in theirs."""
    delta = copy.deepcopy(next(adapter.deltas())).to(torch.bfloat16)
    h = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    p = delta.router(h)
    logits = h.float().unflatten(-1, (2, -1)) @ delta.router.weight.float().T
    torch.testing.assert_close(p, logits.softmax(-1).bfloat16(), atol=0, rtol=0)
    return p


def test_mov_molora__at_step_zero_b_learns_and_the_router_waits():
    model = llama()
    adapter = gw.graft(model, gw.MoLoRA(experts=3, r=2), head=False)
    model(ids(), labels=ids()).loss.backward()
    for p in routers(adapter):
        assert p.grad is None or not p.grad.any()
    for delta in adapter.deltas():
        for expert in delta.experts:
            assert expert.up.grad.any() and not expert.up.any()
            assert 0.01 < expert.down.std() < 0.03
    spread(adapter)
    model(ids(), labels=ids()).loss.backward()
    assert all(p.grad.any() for p in routers(adapter))


@pytest.mark.parametrize("of", ["ia3", "lora(r=2)", "dora(r=2)", "bottleneck(d=3, init='houlsby')"])
def test_mov_molora__equal_experts_do_not_feel_the_router(of):
    (method,) = gw.parse_methods(of)
    model, delta, _ = one_linear(of=method, experts=3)
    x = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for expert in delta.experts[1:]:
            expert.load_state_dict(delta.experts[0].state_dict())
        first = model(x)
        delta.router.weight.mul_(-30)
        torch.testing.assert_close(model(x), first, atol=1e-5, rtol=1e-5)
        delta.experts[1].load_state_dict({k: 3 * v + 0.5 for k, v in delta.experts[1].state_dict().items()})
        assert not torch.allclose(model(x), first, atol=1e-2)


def test_mov_molora__products_are_mixed_not_factors():
    model, delta, base = one_linear(of=gw.LoRA(r=2, alpha=6), experts=2)
    x = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        delta.router.weight.zero_()  # p = (.5, .5)
        (a1, b1), (a2, b2) = ((e.down, e.up) for e in delta.experts)
        plain = F.linear(x, base._parameters["weight"], base._parameters["bias"])
        out = model[2](torch.tanh(plain + 3.0 * x @ ((b1 @ a1 + b2 @ a2) / 2).T))
        factors = model[2](torch.tanh(plain + 3.0 * x @ (((b1 + b2) / 2) @ ((a1 + a2) / 2)).T))
        torch.testing.assert_close(model(x), out, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(x), factors, atol=1e-2)


def test_mov_molora__mixture_by_hand():
    x = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0))
    for of in (gw.LoRA(r=2), gw.IA3(), gw.Bottleneck(d=3, init="houlsby")):
        model, delta, base = one_linear(of=of, experts=3)
        seen = []
        with torch.no_grad():
            p = (x @ delta.router.weight.T).softmax(-1)
            plain = F.linear(x, base._parameters["weight"], base._parameters["bias"])
            for expert in delta.experts:
                if isinstance(of, gw.LoRA):
                    seen.append(plain + 8.0 * x @ expert.down.T @ expert.up.T)
                elif isinstance(of, gw.IA3):
                    seen.append(plain * expert.scale)
                else:
                    seen.append(expert(x, plain))
            mixed = sum(p[..., i, None] * out for i, out in enumerate(seen))
            torch.testing.assert_close(model(x), model[2](torch.tanh(mixed)), atol=1e-5, rtol=1e-5)


def test_mov_molora__vectors_of_an_mlp_are_merged_before_one_product():
    """At the input of "down" the vectors of all experts cost one product with the frozen weight."""
    model = llama(layers=1)
    adapter = gw.graft(model, gw.Mixture(of=gw.IA3(), experts=5, router="head", at="down"), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    calls = []
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))

    def base(given):
        calls.append(given)
        return given @ weight.T

    h = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = delta.linear(h, base, None)
        p = (h @ delta.router.weight.T).softmax(-1)
        expected = (h * (p @ torch.stack([e.scale for e in delta.experts]))) @ weight.T
    assert len(calls) == 1
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("experts", [10, 30])
def test_mov_molora__parameter_formulas(experts):
    model = t5_base()
    mov = gw.MoV(experts=experts)
    attentions, mlps, d, d_h, d_ff = 36, 24, 768, 64, 3072
    expected = attentions * (experts * 2 * d + experts * 2 * d_h) + mlps * (experts * d_ff + experts * d_ff)
    assert closed_form(model, mov) == expected
    assert gw.graft(model, mov, "mov", head=False).num_parameters == expected
    molora = gw.MoLoRA(experts=experts, r=4)
    expected = attentions * 4 * experts * (4 * 2 * d + d) + mlps * experts * (8 * (d + d_ff) + d + d_ff)
    assert closed_form(model, molora) == expected
    assert gw.graft(model, molora, "molora", head=False).num_parameters == expected


def test_mov_molora__top_k_and_auxiliary_losses():
    model, delta, _ = one_linear(of=gw.LoRA(r=2), experts=4, top_k=2, balance=0.1, z_loss=0.01)
    x = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0))
    p = delta.router(x)
    full = (x @ delta.router.weight.T).softmax(-1)
    assert ((p > 0).sum(-1) == 2).all() and torch.equal(p[p > 0], full[p > 0])  # kept as they are
    model.train()
    model(x)
    logits = x @ delta.router.weight.T
    share = F.one_hot(full.argmax(-1), 4).float().mean((0, 1))
    expected = 0.1 * 16 * (share * full.mean((0, 1))).mean() + 0.01 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(gw.auxiliary_loss(model), expected)
    copy.deepcopy(model)


def test_mov_molora__refusals():
    with pytest.raises(GraftError, match="token by token"):
        gw.graft(torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3)), gw.Mixture(of=gw.LoRA(r=2), at="conv"), head=False)
    model = llama()
    gw.graft(model, gw.MoLoRA(experts=2), head=False)
    with pytest.raises(GraftError, match="merge"):
        gw.merge(model)
    with pytest.raises(GraftError, match="prefix"):
        gw.graft(t5(), gw.Mixture(of=gw.Prefix()), head=False)


def test_mov_molora__comes_back_from_a_file(tmp_path):
    model = llama()
    spread(gw.graft(model, gw.MoLoRA(experts=3, r=2), "m", head=False))
    expected = logits(model)
    gw.save(model, "m", tmp_path / "m")
    other = llama()
    gw.load(other, tmp_path / "m")
    assert torch.equal(logits(other), expected)
