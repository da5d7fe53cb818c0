"""MoKA: a gated sum of Kronecker products of several shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import llama_of, on_meta, spread
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.forms.kronecker import kronecker_linear
from graftwork.methods.weight.moka_kron import balanced

pytestmark = pytest.mark.system("moka-kron")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(d_in, d_out, moved=True, **options):
    torch.manual_seed(0)
    model = around(nn.Linear(d_in, d_out))
    adapter = gw.graft(model, gw.MoKAKron(at="/site/", **options), head=False)
    if moved:
        spread(adapter)
    (delta,) = adapter.deltas()
    return model, delta


def change(model, delta):
    return (delta.weight(model.site.weight) - model.site.weight).detach()


@pytest.mark.parametrize(("a", "b"), [((2, 3), (6, 8)), ((4, 6), (3, 4)), ((12, 1), (1, 24)), ((1, 24), (12, 1))])
def test_moka_kron__row_major_product(a, b):
    """vec(A X B^T) = (A (x) B) x for 24 -> 12."""
    torch.manual_seed(0)
    a, b, x = torch.randn(1, *a), torch.randn(1, *b), torch.randn(5, 24)
    dense = torch.kron(a[0], b[0])
    assert dense.shape == (12, 24)
    close(kronecker_linear(x, a, b), (dense @ x.T).T)
    m, n = a.shape[-1], b.shape[-1]
    close(kronecker_linear(x, a, b)[0], (a[0] @ x[0].view(m, n) @ b[0].T).flatten())


@pytest.mark.parametrize("d", [24, 240])  # with the sum, and with products that do not form it
def test_moka_kron__sum_of_gated_products(d):
    model, delta = layer(d, d // 2, r=2, shapes=("2x3", "4x2") if d == 24 else ("10x12", "12x20"))
    g = delta.gate.softmax(-1)
    dense = sum(g[i] * torch.kron(delta.left[i], delta.right[i]) for i in range(2))
    close(change(model, delta), dense.detach())
    assert (3 * delta.work() <= d * d // 2) == (d == 240)
    x = torch.randn(3, 2, d)
    close(model(x), F.linear(x, model.site.weight + dense, model.site.bias), 1e-4)


def test_moka_kron__one_term_is_lokr():
    model, delta = layer(64, 48, r=1, shapes=("6x8",))
    torch.manual_seed(0)
    other = around(nn.Linear(64, 48))
    (lokr,) = gw.graft(other, gw.LoKr(r=8, alpha=8.0, at="/site/"), head=False).deltas()
    lokr.left.whole.data, lokr.right.whole.data = delta.left[0].data, delta.right[0].data
    x = torch.randn(3, 64)
    assert torch.equal(model.site.weight, other.site.weight)
    close(model(x), other(x))


def test_moka_kron__fixed_identities_give_equal_blocks():
    model, delta = layer(24, 16, r=1, fixed=True, shapes=("8x8",))
    assert [n for n, _ in delta.named_parameters()] == ["gate", "right.0"]
    blocks = change(model, delta).view(8, 2, 8, 3).transpose(1, 2)  # [8, 8, 2, 3]
    off = ~torch.eye(8, dtype=torch.bool)
    assert not blocks[off].any()
    assert blocks[0, 0].abs().min() > 0
    for i in range(8):  # to the rounding of a sum with another weight
        close(blocks[i, i], delta.right[0].detach(), 1e-6)


def test_moka_kron__gate():
    model, delta = layer(24, 16, moved=False, r=4)
    close(delta.gate.softmax(-1), torch.full((4,), 0.25))
    assert delta.gate.detach().softmax(-1).sum().item() == pytest.approx(1.0)
    x, optimiser = torch.randn(6, 24), torch.optim.SGD(delta.parameters(), lr=0.1)
    target = torch.randn(6, 16)
    for step in range(2):
        optimiser.zero_grad()
        (model(x) - target).square().mean().backward()
        assert delta.gate.grad.any() == (step == 1)
        assert all(b.grad.any() for b in delta.right)
        optimiser.step()
    _, even = layer(24, 16, r=4, gate="uniform")
    assert even.gate is None
    dense = sum(torch.kron(a, b) for a, b in zip(even.left, even.right, strict=True)) / 4
    close(even.update(), dense)


def test_moka_kron__counts():
    assert balanced(4096, 4096, 5, square=False) == [(64, 64), (32, 128), (128, 32), (16, 256), (256, 16)]
    site = nn.ModuleDict({"one": on_meta(lambda: nn.Linear(4096, 4096))})
    assert counts(site, gw.MoKAKron(at="/one/")) == (10 * 8192 + 10,) * 2
    assert counts(site, gw.MoKAKron(at="/one/", gate="uniform")) == (10 * 8192,) * 2
    model = llama_of(4096, 32, 32, 11008)
    assert counts(model, gw.MoKAKron()) == (64 * 81_930,) * 2  # 5.2M
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336
    )
    grouped = on_meta(lambda: LlamaForCausalLM(config))
    made, said = counts(grouped, gw.MoKAKron())
    assert made == said == 32 * (81_930 + 40_970)  # 3.9M


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"shapes": ("5x4",)}, "do not divide"),
        ({"shapes": ("4x5",)}, "do not divide"),
        ({"shapes": ("4",)}, "4"),
        ({"shapes": ("2x4",), "fixed": True}, "not square"),
    ],
)
def test_moka_kron__shapes_that_do_not_fit(options, found):
    with pytest.raises(gw.GraftError, match=found):
        layer(24, 16, **options)
