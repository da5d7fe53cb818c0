"""Zhu et al. 2024: a random frozen A, and B alone learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama
from safetensors.torch import load_file
from started import by_site, close, train
from torch import nn
from weight_models import around, counts, gpt2, mixtral, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("asymmetry-lora")


@pytest.mark.parametrize("make", [bert, llama, gpt2, mixtral])
def test_asymmetry_lora__orthonormal_rows_that_nobody_trains(make):
    model, x = make(), ids()
    before = model(x).logits
    at = "expert.gate_up, expert.down" if make is mixtral else "q, v"
    adapter = gw.graft(model, gw.AsymmetryLoRA(r=4, at=at), head=False)
    assert torch.equal(model(x).logits, before)
    start = {id(d): d.down.clone() for d in adapter.deltas()}
    for delta in adapter.deltas():
        close(delta.down @ delta.down.mT, torch.eye(4).expand(*delta.down.shape[:-2], 4, 4))
    assert len({d.down.sum().item() for d in adapter.deltas()}) == len(start)  # each site has its own
    train(model, x)
    for delta in adapter.deltas():
        assert not delta.down.requires_grad
        assert torch.equal(delta.down, start[id(delta)])
        assert delta.up.abs().max() > 0


def test_asymmetry_lora__the_first_gradient_is_loras():
    model, other, x = llama(), llama(), ids()
    ours = gw.graft(model, gw.AsymmetryLoRA(r=4), head=False)
    lora = gw.graft(other, gw.LoRA(r=4), head=False)
    for mine, theirs in zip(ours.deltas(), lora.deltas(), strict=True):
        theirs.down.data = mine.down.clone()
    for m in (model, other):
        m(x).logits.square().mean().backward()
    for mine, theirs in zip(ours.deltas(), lora.deltas(), strict=True):
        close(mine.up.grad, theirs.up.grad, 1e-6)


@pytest.mark.parametrize("r", [4, 12])
def test_asymmetry_lora__a_step_is_the_projected_gradient(r):
    torch.manual_seed(0)
    model, lr, alpha = around(nn.Linear(12, 16)), 0.1, 6.0
    gw.graft(model, gw.AsymmetryLoRA(r=r, alpha=alpha, at="linear"), head=False)
    ((w, delta),) = by_site(model)
    x = torch.randn(9, 12)
    full = w.clone().requires_grad_()
    F.linear(x, full, model.site.bias).square().sum().backward()
    model(x).square().sum().backward()
    torch.optim.SGD([delta.up], lr=lr).step()
    a = delta.down
    wanted = -lr * (alpha / r) ** 2 * full.grad @ a.T @ a
    close(delta.weight(w) - w, wanted, 1e-4)
    if r == 12:  # the whole space: the gradient itself
        close(delta.weight(w) - w, -lr * (alpha / r) ** 2 * full.grad, 1e-4)


def test_asymmetry_lora__a_file_without_a(tmp_path):
    model, x = llama(), ids()
    adapter = gw.graft(model, gw.AsymmetryLoRA(r=4, seed=7), "a", head=False)
    train(model, x)
    gw.save(model, "a", tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert sum(t.numel() for t in stored.values()) == adapter.num_parameters
    again = llama()
    torch.manual_seed(99)
    gw.load(again, tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)
    (one, *_), (two, *_) = (gw.graft(llama(), gw.AsymmetryLoRA(r=4, seed=s), head=False).deltas() for s in (7, 8))
    assert not torch.equal(one.down, two.down)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_asymmetry_lora__singular_vectors(make, tmp_path):
    model, x = make(), ids()
    gw.graft(model, gw.AsymmetryLoRA(r=4, init_down="svd"), "a", head=False)
    for w, delta in by_site(model, "a"):
        assert torch.equal(delta.down, torch.linalg.svd(w, full_matrices=False).Vh[:4])
    train(model, x)
    gw.save(model, "a", tmp_path)
    again = make()
    gw.load(again, tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)


def test_asymmetry_lora__the_other_halves():
    """Only A, both, and a trained middle between frozen factors; and what would never learn."""
    model, x = llama(), ids()
    before = model(x).logits
    gw.graft(model, gw.AsymmetryLoRA(r=4, train="down", init_down="zero", init_up="rand"), "a", head=False)
    assert torch.equal(model(x).logits, before)
    for _, delta in by_site(model, "a"):
        close(delta.up.mT @ delta.up, torch.eye(4))
        assert [n for n, _ in delta.named_parameters()] == ["down"]
    gw.graft(model, gw.AsymmetryLoRA(r=4, train="middle", init_down="svd", init_up="svd", alpha=4.0), "b", head=False)
    for w, delta in by_site(model, "b"):
        u, _, v = torch.linalg.svd(w, full_matrices=False)
        close(delta.weight(w), w + u[:, :4] @ v[:4])  # nothing is subtracted: the start is not W
    train(model, x)
    assert all((d.middle - torch.eye(4)).abs().max() > 0 for _, d in by_site(model, "b"))
    for wrong in (
        {"train": "down"},
        {"train": "middle"},
        {"init_down": "zero"},
        {"init_down": "zero", "train": "both"},
    ):
        with pytest.raises(gw.GraftError, match="learn"):
            gw.AsymmetryLoRA(**wrong)


def test_asymmetry_lora__counts():
    base = roberta_of("base")
    assert counts(base, gw.AsymmetryLoRA(r=8)) == (147_456, 147_456)
    assert 2 * 147_456 == counts(base, gw.LoRA(r=8))[0] == counts(base, gw.AsymmetryLoRA(r=16))[0]
    assert counts(base, gw.AsymmetryLoRA(r=8, train="middle", init_up="rand")) == (24 * 64, 24 * 64)
