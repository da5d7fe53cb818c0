"""Yang et al. 2024: LoRA that starts where a few samples' inputs ask for W most, or least."""

from __future__ import annotations

import pytest
import torch
from adapter_models import ids, llama
from started import by_site, close, first, train, unchanged, weights
from torch import nn
from weight_models import around, counts, gpt2, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("corda")


def squares(model, x):
    return (model(x).logits if hasattr(model(x), "logits") else model(x)).square().mean()


def one_layer(method, x, d_in=24, d_out=16, seed=0):
    """(W, the delta) of a single linear layer after calibration with the inputs x."""
    torch.manual_seed(seed)
    model = around(nn.Linear(d_in, d_out))
    gw.graft(model, method, head=False)
    gw.calibrate(model, [x], squares)
    ((w, delta),) = by_site(model)
    return w, delta


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [3.0, 12.0])
def test_corda__identity_after_calibration(make, mode, alpha, tmp_path):
    model, x = make(), ids()
    before, kept = model(x).logits, weights(model)
    gw.graft(model, gw.CorDA(r=3, alpha=alpha, mode=mode), "a", head=False)
    gw.calibrate(model, [ids(seed=1), ids(seed=2)], squares)
    close(model(x).logits, before, 1e-4)
    for w, delta in by_site(model, "a"):
        whole = w - first(delta) + delta.scale * delta.up @ delta.down
        assert (whole - w).norm() < 1e-4 * w.norm()
        assert first(delta).norm() > 1e-3 * w.norm()
    train(model, x)
    unchanged(model, kept)
    gw.save(model, "a", tmp_path)
    again = make()
    (method,) = gw.load(again, tmp_path).methods  # a plain LoRA, on the weights as they are
    assert (method.name, method.r, method.alpha) == ("lora", 6, 2 * alpha)
    close(again(x).logits, model(x).logits)


@pytest.mark.parametrize("damp", ["identity", "large"])
def test_corda__without_a_context_it_is_pissa(damp):
    x = torch.eye(24)[:, None] if damp == "identity" else torch.randn(4, 5, 24)
    w, delta = one_layer(gw.CorDA(r=5, alpha=7.0, damp=0.01 if damp == "identity" else 1e6, at="linear"), x)
    u, s, v = torch.linalg.svd(w)
    close(first(delta), u[:, :5] * s[:5] @ v[:5], 1e-4)


def test_corda__the_inputs_are_what_is_taken_out():
    basis = torch.linalg.qr(torch.randn(24, 3, generator=torch.Generator().manual_seed(5))).Q
    x = torch.randn(8, 10, 3, generator=torch.Generator().manual_seed(6)) @ basis.T
    left = {}
    w, delta = one_layer(gw.CorDA(r=4, alpha=8.0, damp=1e-4, at="linear"), x)
    left["corda"] = ((w - first(delta)) @ basis).norm() / (w @ basis).norm()
    torch.manual_seed(0)
    model = around(nn.Linear(24, 16))
    gw.graft(model, gw.PiSSA(r=4, at="linear"), head=False)
    ((same, delta),) = by_site(model)
    assert torch.equal(same, w)
    left["pissa"] = ((w - first(delta)) @ basis).norm() / (w @ basis).norm()
    assert left["corda"] < 0.01 < 0.1 < left["pissa"]


def test_corda__knowledge_is_kept_by_the_other_end():
    x = torch.randn(8, 10, 24, generator=torch.Generator().manual_seed(6)) * torch.linspace(0.1, 3, 24)
    moved = {}
    for mode in ("ipm", "kpm"):
        _, delta = one_layer(gw.CorDA(r=4, mode=mode, at="linear"), x)
        moved[mode] = (x @ first(delta).T).norm()
    assert moved["kpm"] < 0.5 * moved["ipm"]


def test_corda__rows_of_a_batch_are_samples():
    x = torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(6)) * torch.arange(1.0, 7)[:, None, None]
    torch.manual_seed(0)
    model = around(nn.Linear(24, 16))
    pairs = []
    for batches in ([x], list(x.split(1)), list(x.split(4))):
        gw.graft(model, gw.CorDA(r=4, at="linear"), "a", head=False)
        gw.calibrate(model, batches, squares)
        ((_, delta),) = by_site(model, "a")
        pairs.append(first(delta))
        gw.remove(model, "a")
    close(pairs[0], pairs[1])
    close(pairs[0], pairs[2])


def test_corda__nothing_is_trained_before_the_data_were_seen():
    model, x = llama(), ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.CorDA(r=3), head=False)
    close(model(x).logits, before)
    with pytest.raises(gw.GraftError, match="calibrate"):
        model.train()(x)
    gw.calibrate(model, [x], squares)
    assert all(d.seen is None for d in adapter.deltas())
    model(x).logits.square().mean().backward()
    assert all(d.down.grad.abs().max() > 0 for d in adapter.deltas())
    torch.manual_seed(0)
    with pytest.raises(gw.GraftError, match="linear layers"):
        gw.graft(around(nn.Conv1d(4, 4, 3)), gw.CorDA(r=2, at="conv"), head=False)


def test_corda__counts():
    assert counts(roberta_of("base"), gw.CorDA(r=8)) == (294_912, 294_912)
