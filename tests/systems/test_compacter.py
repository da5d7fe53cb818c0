"""Karimi Mahabadi et al. 2021: Kronecker-factored adapters with one shared set of small matrices."""

from __future__ import annotations

import pytest
import torch
from adapter_models import closed_form, ids, spread, t5, t5_base

import graftwork as gw

pytestmark = pytest.mark.system("compacter")


def linear(k: int, d: int, **hyper) -> torch.nn.Module:
    """One PHM layer k -> d with random values."""
    adapter = gw.graft(torch.nn.Linear(k, d), gw.PHM(d=k, at="linear", **hyper), head=False)
    spread(adapter, 0.5)
    return next(adapter.deltas()).up


@pytest.mark.parametrize("rank", [1, 3, 0])
def test_compacter__product_is_the_sum_of_kronecker_products(rank):
    layer = linear(8, 12, n=4, rank=rank)
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    blocks = layer.s if rank == 0 else layer.s @ layer.t
    right = sum(torch.kron(layer.a[i], blocks[i]) for i in range(4))
    swapped = sum(torch.kron(blocks[i], layer.a[i]) for i in range(4))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ right + layer.bias, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.matrix(), right, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(layer(x), x @ swapped + layer.bias, atol=1e-2)


def test_compacter__one_block_is_the_plain_low_rank_adapter():
    layer = linear(6, 10, n=1, rank=1)
    with torch.no_grad():
        layer.a.fill_(1.0)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x @ (layer.s[0] @ layer.t[0]) + layer.bias)
        assert torch.linalg.matrix_rank(layer.matrix()) == 1
        # r' = min(k, d) with n = 1 holds any matrix
        full = linear(6, 10, n=1, rank=6)
        wanted = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
        full.a.fill_(1.0)
        full.s.copy_(torch.eye(6)[None])
        full.t.copy_(wanted[None])
        torch.testing.assert_close(full.matrix(), wanted)


@pytest.mark.parametrize("name, adapters, expected", [("compacter", 48, 161_728), ("compacter_pp", 24, 104_704)])
def test_compacter__parameter_oracles_on_t5_base(name, adapters, expected):
    model = t5_base()
    methods = gw.parse_methods(f"{name}(n=4, reduction=32)")
    assert closed_form(model, methods) == expected
    adapter = gw.graft(model, methods, head=False)
    assert adapter.num_parameters == expected
    assert len(adapter.parts[0].sites) == adapters
    assert not any(site.cross for site in adapter.parts[0].sites)
    norms = adapter.parts[1]
    assert sum(p.numel() for d in norms.deltas.values() for p in d.parameters()) == 62 * 768


def test_compacter__a_is_one_tensor_with_the_sum_of_gradients():
    model = t5()
    adapter = gw.graft(model, gw.Compacter(n=4, reduction=4, norms=False), head=False)
    spread(adapter)
    deltas = list(adapter.deltas())
    rules = {id(layer.a) for d in deltas for layer in (d.down, d.up)}
    assert len(rules) == 1 and len(deltas) == 8
    names = [name for name in adapter.state_dict() if name.endswith(".a")]
    assert len(names) == 1
    inside = [name for name, _ in model.named_parameters() if name.endswith("rule.a")]
    assert len(inside) == 1

    def loss():
        return model(input_ids=ids(), labels=ids(seed=5)).loss

    (a,) = adapter.parts[0].shared_modules.parameters()
    loss().backward()
    whole = a.grad.clone()
    # the same value in a parameter of its own per matrix: the gradients of all of them add up to the shared one's
    own = []
    for d in deltas:
        for layer in (d.down, d.up):
            own.append(torch.nn.Module())
            own[-1].a = torch.nn.Parameter(a.detach().clone())
            layer._rules[0] = own[-1]
    loss().backward()
    torch.testing.assert_close(sum(m.a.grad for m in own), whole, atol=1e-6, rtol=1e-4)


def test_compacter__starts_near_the_identity_and_comes_back_from_a_file(tmp_path):
    model = t5()
    x, y = ids(), ids(seed=5)
    with torch.no_grad():
        base = model(input_ids=x, decoder_input_ids=y).logits
        adapter = gw.graft(model, gw.Compacter(n=4, reduction=4), "c", head=False)
        torch.testing.assert_close(model(input_ids=x, decoder_input_ids=y).logits, base, atol=1e-4, rtol=1e-4)
        spread(adapter)
        trained = model(input_ids=x, decoder_input_ids=y).logits
        gw.save(model, "c", tmp_path / "c")
        other = t5()
        gw.load(other, tmp_path / "c")
        assert torch.equal(other(input_ids=x, decoder_input_ids=y).logits, trained)
