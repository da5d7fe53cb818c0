"""Yu et al. 2025: the minor components of each weight are trained; the weight stays as it is."""

from __future__ import annotations

import pytest
import torch
from adapter_models import ids, llama
from started import by_site, close, first, train, unchanged, weights
from torch import nn
from weight_models import around, counts, gpt2, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("urae")


@pytest.mark.parametrize("make", [llama, gpt2])
def test_urae__the_residual_keeps_the_top_of_the_spectrum(make):
    model, x = make(), ids()
    before, kept = model(x).logits, weights(model)
    gw.graft(model, gw.URAE(r=4), head=False)
    close(model(x).logits, before)
    for w, delta in by_site(model):
        assert delta.scale == 1
        close(w - first(delta) + delta.up @ delta.down, w)
        s = torch.linalg.svdvals(w)
        left = torch.linalg.svdvals(w - first(delta))
        close(left[: len(s) - 4], s[:-4])
        close(left[len(s) - 4 :], torch.zeros(4))
    train(model, x)
    unchanged(model, kept)
    gw.remove(model, "default")
    assert torch.equal(model(x).logits, before)


def test_urae__the_first_end_is_pissa_and_the_export_is_exact(tmp_path):
    model, other, x = llama(), llama(), ids()
    gw.graft(model, gw.URAE(r=4, end="first"), "a", head=False)
    gw.graft(other, gw.PiSSA(r=4, alpha=4.0, at="q, k, v, o"), "a", head=False)
    for (_, one), (_, two) in zip(by_site(model, "a"), by_site(other, "a"), strict=True):
        assert torch.equal(one.up, two.up) and torch.equal(one.down, two.down)
    with pytest.raises(gw.GraftError, match="first"):
        gw.URAE(end="middle")
    gw.remove(model, "a")
    gw.graft(model, gw.URAE(r=4), "a", head=False)
    train(model, x)
    gw.save(model, "a", tmp_path)
    again = llama()
    (method,) = gw.load(again, tmp_path).methods
    assert (method.r, method.scale) == (8, 1.0)
    close(again(x).logits, model(x).logits)


def test_urae__in_bfloat16_the_start_is_within_its_rounding():
    torch.manual_seed(0)
    model = around(nn.Linear(48, 32)).bfloat16()
    gw.graft(model, gw.URAE(r=6, at="linear"), head=False)
    ((w, delta),) = by_site(model)
    assert delta.down.dtype == torch.bfloat16
    adapted = delta.weight(w).float()
    assert (adapted - w.float()).abs().max() < torch.finfo(torch.bfloat16).eps * torch.linalg.matrix_norm(w.float(), 2)
    # the triples are those of float32: rounding them is all that separates the two
    u, s, v = torch.linalg.svd(w.float(), full_matrices=False)
    exact = u[:, -6:] * s[-6:] @ v[-6:]
    assert (first(delta).float() - exact).norm() < 3 * torch.finfo(torch.bfloat16).eps * exact.norm()


def test_urae__guidance_is_off_in_training():
    class Guided(nn.Module):
        def forward(self, x, guidance):
            return x * guidance

    model, x = Guided(), torch.ones(2)
    assert torch.equal(model.train()(x, gw.guidance(model, 3.5)), x)
    assert torch.equal(model.eval()(x, gw.guidance(model, 3.5)), 3.5 * x)


def test_urae__counts():
    assert counts(roberta_of("base"), *gw.URAE(r=16)) == (4 * 12 * 16 * 2 * 768,) * 2
