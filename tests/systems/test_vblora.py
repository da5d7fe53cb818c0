"""Li et al. 2024: the factors of all sites out of one bank of vectors."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids, llama
from safetensors.torch import load_file
from torch import nn
from weight_models import around, counts, gpt2, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("vblora")
SIX = "q, k, v, o, up, down"


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def bank(adapter) -> nn.Parameter:
    return adapter.parts[0].shared_modules["bank"].vectors


def wide(adapter) -> None:
    """A bank large enough for its effect to be seen."""
    bank(adapter).data = torch.randn(bank(adapter).shape, generator=torch.Generator().manual_seed(2))


def test_vblora__the_equation():
    torch.manual_seed(0)
    model = around(nn.Linear(12, 8, bias=False))
    adapter = gw.graft(model, gw.VBLoRA(r=2, vectors=5, length=4, topk=2, at="linear"), head=False)
    wide(adapter)
    (delta,) = adapter.deltas()
    v, down, up = bank(adapter), torch.zeros(2, 12), torch.zeros(8, 2)

    def mixed(logits):
        values, index = logits.sort(descending=True)
        p = values[:2].softmax(0)
        return p[0] * v[index[0]] + p[1] * v[index[1]]

    for i in range(2):
        for j in range(3):
            down[i, 4 * j : 4 * j + 4] = mixed(delta.logits_down[i, j])
        for j in range(2):
            up[4 * j : 4 * j + 4, i] = mixed(delta.logits_up[j, i])
    x = torch.randn(6, 12)
    close(model(x), x @ (model.site.weight + up @ down).T)


def test_vblora__one_vector_all_vectors_and_a_dominant_one():
    for topk in (1, 7):
        model = around(nn.Linear(12, 8))
        adapter = gw.graft(model, gw.VBLoRA(r=2, vectors=7, length=4, topk=topk, at="linear"), head=False, seed=0)
        wide(adapter)
        (delta,) = adapter.deltas()
        model(torch.randn(3, 12)).square().sum().backward()
        v = bank(adapter)
        assert v.grad.abs().max() > 0
        if topk == 1:  # the weight is one, exactly: only the bank learns
            assert not delta.logits_down.grad.any() and not delta.logits_up.grad.any()
            assert torch.equal(delta.stretches("down"), v[delta.logits_down.argmax(-1)])
        else:  # the whole softmax
            assert (delta.logits_down.grad != 0).all()
            close(delta.stretches("down"), delta.logits_down.softmax(-1) @ v)
        delta.logits_down.data[0, 0, 3] = 60.0
        close(delta.stretches("down")[0, 0], v[3])


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_vblora__what_is_stored_computes_the_same_and_is_not_trained(make, topk, tmp_path):
    model, x = make(), ids()
    adapter = gw.graft(model, gw.VBLoRA(r=2, vectors=9, length=8, topk=topk, at="q, v"), "a", head=False)
    wide(adapter)
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert not any("logits" in name for name in stored)
    assert {t.dtype for name, t in stored.items() if "index_" in name} == {torch.uint8}
    assert all(t.shape[-1] == topk - 1 for name, t in stored.items() if "share_" in name)
    again = make()
    gw.load(again, tmp_path / "a")
    assert torch.equal(again(x).logits, out)
    gw.save(again, "a", tmp_path / "b")
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter.safetensors"
    ).read_bytes()
    other = make()
    gw.load(other, tmp_path / "a", trainable=True)
    with pytest.raises(gw.GraftError, match="no logits"):
        other.train()(x)
    gw.save(model, "a", tmp_path / "resumed", resume=True)
    third = make()
    assert gw.load(third, tmp_path / "resumed", trainable=True).num_parameters == adapter.num_parameters
    third.train()(x).logits.square().mean().backward()


@pytest.mark.parametrize(("size", "reported"), [("base", 26_928), ("large", 33_408)])
def test_vblora__the_reported_sizes(size, reported):
    """Of what is stored, in numbers of 4 bytes."""
    model = roberta_of(size)
    method = gw.VBLoRA(r=4, vectors=90, length=256, at=SIX)
    made, said = counts(model, method)
    stretches = {"base": 2592, "large": 6912}[size]
    assert made == said == 90 * 256 + stretches * 90
    adapter = gw.graft(model, method, head=False)
    _, per_site, shared = method.fold(adapter.parts[0])
    tensors = [t for d in per_site.values() for t in d.values()] + list(shared.values())
    assert sum(t.nbytes for t in tensors) == 4 * reported


def test_vblora__one_bank_for_all_sites():
    model, x = llama(), ids()
    adapter = gw.graft(model, gw.VBLoRA(r=2, vectors=6, length=8, at="q, v"), head=False)
    wide(adapter)
    v, deltas = bank(adapter), list(adapter.deltas())
    before = [d.stretches("down").detach() for d in deltas]
    model(x).logits.square().mean().backward()
    whole, parts = v.grad.clone(), torch.zeros_like(v)
    for kept in deltas:  # the gradient of each site alone: the others see a copy
        for d in deltas:
            d._bank = (adapter.parts[0].shared_modules["bank"],) if d is kept else (Copied(v),)
        v.grad = None
        model(x).logits.square().mean().backward()
        parts += v.grad
    close(parts, whole)
    for d in deltas:
        d._bank = (adapter.parts[0].shared_modules["bank"],)
    v.data.add_(1.0)
    assert all((d.stretches("down") - b).abs().min() > 0.9 for d, b in zip(deltas, before, strict=True))


class Copied(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.vectors = v.detach().clone()


def test_vblora__rates_and_refusals(tmp_path):
    adapter = gw.graft(llama(), gw.VBLoRA(r=2, vectors=6, length=8, at="q, v"), head=False)
    rates = {round(g["lr"], 9): len(g["params"]) for g in adapter.groups(1e-3)}
    assert rates == {1e-3: 1, 1e-2: 8}
    assert bank(adapter).abs().max() <= 0.02
    with pytest.raises(gw.GraftError, match="topk <= vectors"):
        gw.VBLoRA(vectors=3, topk=4)
    model = around(nn.Linear(12, 8))
    with pytest.raises(gw.GraftError, match="length=5"):
        gw.graft(model, gw.VBLoRA(length=5, at="linear"), head=False)
