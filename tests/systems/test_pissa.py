"""Meng et al. 2024: LoRA that starts at the principal triples of W, which stays as it is."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids, llama
from safetensors.torch import load_file
from started import by_site, close, first, train, unchanged, weights
from torch import nn
from weight_models import around, counts, gpt2, mixtral, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("pissa")


@pytest.mark.parametrize("make", [bert, llama, gpt2, mixtral])
def test_pissa__identity_and_the_base_without_it(make):
    model, x = make(), ids()
    before, kept = model(x).logits, weights(model)
    at = "expert.gate_up, expert.down" if make is mixtral else "q, v"
    gw.graft(model, gw.PiSSA(r=4, at=at), head=False)
    close(model(x).logits, before)
    train(model, x)
    assert (model(x).logits - before).abs().max() > 1e-3
    unchanged(model, kept)
    with gw.using(model, None):
        assert torch.equal(model(x).logits, before)


def test_pissa__gradients_reach_both_factors_at_once():
    model, x = llama(), ids()
    adapter = gw.graft(model, gw.PiSSA(r=4), head=False)
    model(x).logits.square().mean().backward()
    for delta in adapter.deltas():
        assert delta.down.grad.abs().max() > 0
        assert delta.up.grad.abs().max() > 0
        assert not delta.first_down.requires_grad


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_pissa__the_rank_2r_export_is_the_trained_model(make, rslora, tmp_path):
    model, x = make(), ids()
    gw.graft(model, gw.LoRA(r=3, alpha=5.0, rslora=rslora, init="pissa"), "a", head=False)
    train(model, x)
    out = model(x).logits
    gw.save(model, "a", tmp_path)
    again = make()
    adapter = gw.load(again, tmp_path)
    (method,) = adapter.methods
    assert (method.r, method.init, method.rslora) == (6, "kaiming", False)
    assert method.scale == pytest.approx(5 / 3**0.5 if rslora else 5 / 3)
    close(again(x).logits, out)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_pissa__the_first_term_is_the_best_of_its_rank(make):
    model = make()
    gw.graft(model, gw.PiSSA(r=5, alpha=3.0, at="q, v, down"), head=False)
    for w, delta in by_site(model):
        s = torch.linalg.svdvals(w.double())
        left = (w.double() - first(delta).double()).square().sum()
        assert left.item() == pytest.approx(s[5:].square().sum().item(), rel=1e-4)
        close(delta.up.mT @ delta.up, torch.diag(s[:5].float() / delta.scale), 1e-4)  # the values are shared out
        close(delta.down @ delta.down.mT, torch.diag(s[:5].float() / delta.scale), 1e-4)


def test_pissa__others_come_and_go_and_w_stays():
    model, x = llama(), ids()
    kept, alone = weights(model), model(x).logits
    for name in "ab":
        gw.graft(model, gw.PiSSA(r=3), name, head=False)
        train(model, x)
        unchanged(model, kept)
    starts = [[first(d) for _, d in by_site(model, name)] for name in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))  # the second saw the same W
    with torch.no_grad():
        gw.activate(model, "0.5*a + 0.5*b")
        mixed = model(x).logits
        gw.merge(model)
        close(model(x).logits, mixed)
        gw.unmerge(model)
    gw.combine(model, "c", {"a": 0.5, "b": 0.5})
    close(model(x).logits, mixed, 1e-4)
    for name in "abc":
        gw.remove(model, name)
        unchanged(model, kept)
    assert torch.equal(model(x).logits, alone)


def test_pissa__a_randomised_decomposition_is_near_the_exact_one():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(60, 40)).Q, torch.linalg.qr(torch.randn(40, 40)).Q
    model = around(nn.Linear(40, 60))
    model.site.weight.data = u @ torch.diag(0.7 ** torch.arange(40.0)) @ v
    for seed in (0, 1):
        gw.graft(model, gw.PiSSA(r=4, niter=8, at="linear"), "a", head=False, seed=seed)
        ((w, delta),) = by_site(model, "a")
        assert (w - first(delta)).norm() <= 1.001 * torch.linalg.svdvals(w)[4:].norm()
        gw.remove(model, "a")


def test_pissa__training_goes_on_from_a_resumable_save(tmp_path):
    model, x = llama(), ids()
    gw.graft(model, gw.PiSSA(r=3), "a", head=False)
    train(model, x)
    gw.save(model, "a", tmp_path, resume=True)
    again = llama()
    assert [m.init for m in gw.load(again, tmp_path, trainable=True).methods] == ["pissa"]
    for m in (model, again):
        train(m, x)
    assert torch.equal(model(x).logits, again(x).logits)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert sum("first_" in name for name in stored) == 8  # the frozen term is the adapter's own


def test_pissa__dropout_leaves_the_frozen_term_alone():
    """y = W_res x + s B A drop(x): what is dropped is the input of the trained pair."""
    torch.manual_seed(0)
    model = around(nn.Linear(12, 10)).train()
    gw.graft(model, gw.PiSSA(r=4, dropout=0.5, at="linear"), head=False)
    ((w, delta),) = by_site(model)
    x, total = torch.randn(5, 12), torch.zeros(5, 10)
    with torch.no_grad():
        for _ in range(3000):
            total += model(x)
        close(total / 3000, model.eval()(x), 0.1)
        delta.up.zero_()
        residual = x @ (w - first(delta)).T + model.site.bias
        close(model.train()(x), residual)


def test_pissa__counts():
    assert counts(roberta_of("base"), *gw.PiSSA(r=8)) == (294_912, 294_912)


def test_pissa__what_cannot_be_is_refused():
    model = around(nn.Linear(6, 4))
    with pytest.raises(gw.GraftError, match="a rank above 4"):
        gw.graft(model, gw.PiSSA(r=5, at="linear"), head=False)
    for wrong in ({"bias": True}, {"alpha": 0.0}, {"alpha": -1.0}):
        with pytest.raises(gw.GraftError, match="inside of W"):
            gw.LoRA(init="pissa", **wrong)
    with pytest.raises(gw.GraftError, match="niter"):
        gw.LoRA(init="olora", niter=4)
    assert not gw.adapters(model)
