"""Singhal et al. 2025: the elementwise product of two low-rank matrices, run as one low-rank product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import llama_of, spread
from peft import LoHaConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from weight_models import around, counts

import graftwork as gw

pytestmark = pytest.mark.system("abba")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(d_in, d_out, moved=True, **options):
    torch.manual_seed(0)
    model = around(nn.Linear(d_in, d_out))
    adapter = gw.graft(model, gw.ABBA(at="/site/", **options), head=False)
    if moved:
        spread(adapter)
    (delta,) = adapter.deltas()
    return model, delta


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        fresh = not any(r.alias_info for r in function._schema.returns)
        self.seen |= {
            tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor) and fresh
        }
        return out


@pytest.mark.parametrize("shape", [(96, 160), (12, 10)])
def test_abba__factored_forward(shape):
    """By its factors where they are thin, and then without a tensor of the weight's size; else by the update itself."""
    d_out, d_in = shape
    model, delta = layer(d_in, d_out, r1=2, r2=3, alpha1=2.0, alpha2=8.0)
    x = torch.randn(7, d_in, requires_grad=True)
    w = model.site.weight + 4.0 * (delta.up1 @ delta.down1) * (delta.up2 @ delta.down2)
    for mode in (model.train(), model.eval()):
        close(mode(x), F.linear(x, w, model.site.bias), 1e-5)
    thin = d_out == 96
    assert (delta.factors() is not None) == thin
    with Shapes() as made:
        model(x).sum().backward()
    assert ((96, 160) in made.seen or (160, 96) in made.seen) is False if thin else shape in made.seen


def test_abba__gradients_equal_autograd():
    for shape in ((96, 160), (12, 10)):
        model, delta = layer(shape[1], shape[0], r1=2, r2=3)
        x = torch.randn(7, shape[1])
        model(x).square().sum().backward()
        named = {n: p.detach().clone().requires_grad_() for n, p in delta.named_parameters()}
        dw = delta.scale * (named["up1"] @ named["down1"]) * (named["up2"] @ named["down2"])
        F.linear(x, model.site.weight + dw, model.site.bias).square().sum().backward()
        for n, p in delta.named_parameters():
            close(p.grad / p.grad.abs().max(), named[n].grad / p.grad.abs().max(), 1e-4)


@pytest.mark.parametrize("shape", [(24, 20), (200, 150)])  # decomposed whole, and by its leading directions
def test_abba__initial_values(shape):
    model, delta = layer(shape[1], shape[0], moved=False, r1=4, r2=3)
    w = model.site.weight.detach()
    s = torch.linalg.svdvals(w)
    best = s[4:].square().sum().sqrt()
    assert (w - delta.up1 @ delta.down1).norm().item() == pytest.approx(best.item(), rel=2e-3)
    close(delta.up1.norm(dim=0), s[:4].sqrt(), 5e-3)
    close(delta.down1.norm(dim=1), s[:4].sqrt(), 5e-3)
    bound = (6 / shape[1]) ** 0.5
    assert 0.9 * bound < delta.down2.abs().max() <= bound
    x = torch.randn(3, shape[1])
    assert torch.equal(model(x), F.linear(x, w, model.site.bias))
    model(x).square().sum().backward()
    assert {n for n, p in delta.named_parameters() if p.grad.any()} == {"up2"}


def test_abba__rank_of_the_update():
    model, delta = layer(32, 32, r1=3, r2=4)
    dw = (delta.weight(model.site.weight) - model.site.weight).detach()
    assert torch.linalg.matrix_rank(dw, rtol=1e-5) == 12
    assert sum(p.numel() for p in delta.parameters()) == 7 * 64


def test_abba__equals_loha_of_the_same_factors():
    torch.manual_seed(0)
    theirs = get_peft_model(
        around(nn.Linear(24, 16)), LoHaConfig(r=4, alpha=6, target_modules=["site"], init_weights=False)
    ).eval()
    model, delta = layer(24, 16, r1=4, r2=4, alpha1=1.5, alpha2=1.5)  # s = 1.5 = alpha / r
    peer = theirs.base_model.model.site
    with torch.no_grad():
        for i in (1, 2):
            getattr(delta, f"up{i}").copy_(getattr(peer, f"hada_w{i}_a")["default"])
            getattr(delta, f"down{i}").copy_(getattr(peer, f"hada_w{i}_b")["default"])
        x = torch.randn(3, 24)
        close(model(x), theirs(x))


def test_abba__scales():
    assert gw.ABBA(alpha1=4.0, alpha2=9.0).s == 6.0
    assert gw.ABBA(r1=4, r2=16, alpha1=4.0, alpha2=4.0, scale="paper").s == 2.0


def test_abba__a_rank_beyond_the_weight_is_refused():
    with pytest.raises(gw.GraftError, match="has a rank above 10"):
        layer(12, 10, r1=11)


def test_abba__counts():
    """A LoRA of rank 32 on the same sites of LLaMA2-7B."""
    model = llama_of(4096, 32, 32, 11008)
    sites = "q, k, v, o, gate, up, down"
    assert counts(model, gw.ABBA()) == counts(model, gw.LoRA(r=32, at=sites)) == (79_953_920, 79_953_920)
