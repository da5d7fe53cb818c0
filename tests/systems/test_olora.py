"""Büyükakyüz 2024: LoRA that starts at the QR decomposition of W, which stays as it is."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids, llama
from started import by_site, close, first, train, unchanged, weights
from torch import nn
from transformers.pytorch_utils import Conv1D
from weight_models import around, counts, gpt2, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("olora")
LAYERS = [lambda: nn.Linear(12, 12), lambda: nn.Linear(12, 7), lambda: nn.Linear(7, 12), lambda: Conv1D(12, 12),
          lambda: Conv1D(7, 12), lambda: Conv1D(12, 7)]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_olora__orthonormal_and_the_identity(layer):
    torch.manual_seed(0)
    model = around(layer())
    x = torch.randn(4, model.site.weight.shape[1 if isinstance(model.site, nn.Linear) else 0])
    before = model(x)
    gw.graft(model, gw.OLoRA(r=5, at="linear"), head=False)
    close(model(x), before)
    ((w, delta),) = by_site(model)
    close(delta.up.mT @ delta.up, torch.eye(5))
    # its part of W are the r leading columns, exactly those
    close((delta.up @ delta.down)[:, :5], w[:, :5])


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_olora__without_it_the_base_is_the_base(make):
    model, x = make(), ids()
    before, kept = model(x).logits, weights(model)
    gw.graft(model, gw.OLoRA(r=4), head=False)
    close(model(x).logits, before)
    train(model, x)
    unchanged(model, kept)
    with gw.using(model, None):
        assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_olora__the_rank_2r_export_is_the_trained_model(make, tmp_path):
    model, x = make(), ids()
    gw.graft(model, gw.OLoRA(r=3, alpha=5.0), "a", head=False)
    train(model, x)
    out = model(x).logits
    gw.save(model, "a", tmp_path)
    again = make()
    (method,) = gw.load(again, tmp_path).methods
    assert (method.r, method.alpha) == (6, 10.0)
    close(again(x).logits, out)


@pytest.mark.parametrize("alpha", [1.0, 4.0, 16.0])
def test_olora__the_first_term_has_the_scale(alpha):
    model, x = llama(), ids()
    before = model(x).logits
    gw.graft(model, gw.OLoRA(r=4, alpha=alpha), head=False)
    close(model(x).logits, before)
    for w, delta in by_site(model):
        q, upper = torch.linalg.qr(w)
        close(first(delta), alpha / 4 * q[:, :4] @ upper[:4])


def test_olora__counts():
    assert counts(roberta_of("base"), *gw.OLoRA(r=8)) == (294_912, 294_912)
