"""Dettmers et al. 2023: LoRA over a weight held in NF4, its code book, its constants and what merging loses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama, llama_of, spread
from torch import nn
from weight_models import around, counts, dense, gpt2, mixtral

import graftwork as gw
from graftwork.methods.weight.forms.nf4 import NF4, levels

pytestmark = pytest.mark.system("qlora")

# the published code book, as bitsandbytes holds it
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_qlora__the_code_book_is_the_published_one():
    book = levels()
    torch.testing.assert_close(book, torch.tensor(PUBLISHED), atol=1e-6, rtol=0)
    assert {-1.0, 0.0, 1.0} <= set(book.tolist())
    # a number that is a level times the block's largest comes back to the bit
    w = 3.0 * book.repeat(4)
    assert torch.equal(NF4(w, twice=False).dequantised(), w)


@pytest.mark.parametrize("shape", [(64, 96), (7, 13), (1, 1), (3, 5, 11)])
def test_qlora__round_trip(shape):
    w = normal(*shape)
    held = NF4(w, block=64, twice=False)
    back, flat = held.dequantised(), w.flatten()
    assert back.shape == w.shape
    half_gap = levels().diff().max() / 2
    for i, block in enumerate(flat.split(64)):
        c = block.abs().max()
        assert held.scales()[i] == c
        assert (block - back.flatten()[64 * i : 64 * (i + 1)]).abs().max() <= c * half_gap * (1 + 1e-6)
    # every number got the nearest level
    c = held.scales().repeat_interleave(64)[: w.numel()]
    nearest = (flat[:, None] - c[:, None] * levels()).abs().amin(-1)
    torch.testing.assert_close((flat - back.flatten()).abs(), nearest, atol=1e-6, rtol=0)


def test_qlora__normal_numbers_lose_less_than_in_uniform_steps():
    w = normal(256, 1024)
    blocks = w.view(-1, 64)
    c = blocks.abs().amax(-1, keepdim=True)
    uniform = ((blocks / c * 7).round() / 7 * c).view_as(w)  # int4 with the block's largest at 7
    lost = (w - NF4(w, twice=False).dequantised()).square().mean()
    assert lost < 0.9 * (w - uniform).square().mean()
    # the constants' own 8 bits cost next to nothing
    assert (w - NF4(w).dequantised()).square().mean() < 1.02 * lost


def test_qlora__storage():
    n = 64 * 256 * 6
    held = NF4(normal(n))
    assert held.codes.dtype == torch.uint8
    assert held.codes.nbytes == n // 2
    assert held.nbytes == n // 2 + n // 64 + 4 * n // 16384 + 4
    assert 8 * (held.nbytes - 4) / n == pytest.approx(4.127, abs=1e-3)
    assert NF4(normal(n), twice=False).nbytes == n // 2 + 4 * n // 64 + 4
    exact, double = NF4(normal(n), twice=False).scales(), held.scales()
    step = (exact - exact.mean()).abs().max() / 127
    assert (exact - double).abs().max() <= step / 2 * 1.01
    assert not NF4(torch.zeros(10)).dequantised().any()


@pytest.mark.parametrize("bias", [True, False])
def test_qlora__forward_and_gradient_are_those_of_the_dequantised_weight(bias):
    model = around(nn.Linear(40, 24, bias=bias))
    original = model.site.weight.detach().clone()
    adapter = gw.graft(model, gw.QLoRA(r=4, at="linear", block=16), head=False)
    (delta,) = adapter.deltas()
    q = NF4(original, 16).dequantised()
    x = normal(5, 40).requires_grad_()
    y = model(x)
    torch.testing.assert_close(y, F.linear(x, q, model.site.bias), atol=1e-6, rtol=1e-5)
    assert (y - F.linear(x, original, model.site.bias)).abs().max() > 1e-3
    spread(adapter)
    y = model(x)
    whole = q + 16 / 4 * delta.up.detach() @ delta.down.detach()
    torch.testing.assert_close(y, F.linear(x, whole, model.site.bias), atol=1e-4, rtol=1e-4)
    g = normal(5, 24, seed=1)
    (given,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(given, g @ whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_qlora__a_step_trains_the_pair_alone(make):
    model, x = make(), ids()
    adapter = gw.graft(model, gw.QLoRA(r=4), head=False)
    before = [(d.frozen.codes.clone(), d.frozen.constants.clone()) for d in adapter.deltas()]
    backbone = {k: v.clone() for k, v in model.state_dict().items() if "graft" not in k}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    model(x).logits.square().mean().backward()
    own = {id(p) for d in adapter.deltas() for p in (d.down, d.up)}
    assert {id(p) for p in model.parameters() if p.grad is not None} == own
    optimizer.step()
    for d, (codes, constants) in zip(adapter.deltas(), before, strict=True):
        assert torch.equal(d.frozen.codes, codes)
        assert torch.equal(d.frozen.constants, constants)
        assert d.up.any()
    assert all(torch.equal(v, backbone[k]) for k, v in model.state_dict().items() if k in backbone)


@pytest.mark.parametrize("make", [bert, llama, gpt2, mixtral])
def test_qlora__merges_into_the_dequantised_weight_and_says_what_was_lost(make):
    model, x = make(), ids()
    at = "expert.gate_up, expert.down" if make is mixtral else "linear"
    adapter = gw.graft(model, gw.QLoRA(r=4, dropout=0.0, at=at), head=False)
    spread(adapter, 0.05)
    errors = gw.quantisation_errors(adapter)
    assert errors.keys() == adapter.parts[0].deltas.keys()
    for key, (lost, again) in errors.items():
        w, delta = dense(model, key), adapter.parts[0].deltas[key]
        q = NF4(w).dequantised()
        merged = (q + delta.scale * delta.up @ delta.down).detach()
        assert lost == pytest.approx(float((w - q).norm() / w.norm()), rel=1e-5)
        assert again == pytest.approx(float((merged - NF4(merged).dequantised()).norm() / merged.norm()), rel=1e-3)
        assert 0.02 < lost < 0.2
        assert 0.02 < again < 0.2
    with torch.no_grad():
        out = model(x).logits
        gw.merge(model)
        torch.testing.assert_close(model(x).logits, out, atol=1e-4, rtol=1e-4)
        gw.unmerge(model)
        assert torch.equal(model(x).logits, out)


def test_qlora__counts():
    """Guanaco-7B: LoRA of rank 64 on every linear layer of LLaMA-7B's blocks."""
    expected = 32 * 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    model = llama_of(4096, 32, 32, 11008)
    assert counts(model, gw.QLoRA()) == (expected, expected)
    assert expected == 159_907_840


def test_qlora__impossible_settings_are_refused():
    with pytest.raises(gw.GraftError, match="block"):
        gw.QLoRA(block=0)
    with pytest.raises(gw.GraftError, match="dropout"):
        gw.graft(around(nn.Embedding(6, 4)), gw.QLoRA(r=2, dropout=0.1, at="embed"), head=False)
