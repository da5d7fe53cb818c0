"""Liu et al. 2024: a trained magnitude per output unit beside a low-rank update of the direction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama, llama_of, spread
from torch import nn
from weight_models import around, counts, dense, gpt2, mixtral

import graftwork as gw
from graftwork.products.dropout import drop

pytestmark = pytest.mark.system("dora")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(**options):
    """One linear layer with DoRA: the model, its delta, an input."""
    torch.manual_seed(0)
    model = around(nn.Linear(7, 5))
    adapter = gw.graft(model, gw.DoRA(r=2, at="linear", **options), head=False)
    (delta,) = adapter.deltas()
    return model, delta, torch.randn(4, 7)


def adapted(model, delta, w=None):
    """diag(m / |V|) V, formed."""
    v = (model.site.weight if w is None else w) + delta.scale * delta.up @ delta.down
    return delta.magnitude[..., None] * v / v.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("make", [bert, llama, gpt2, mixtral])
@pytest.mark.parametrize("exact", [False, True])
def test_dora__identity_at_init(make, exact):
    model, x = make(), ids()
    before = model(x).logits
    at = {gpt2: "q, v, up, down", mixtral: "q, v, o"}.get(make, "linear")
    gw.graft(model, gw.DoRA(r=3, exact=exact, at=at), head=False)
    assert torch.equal(model(x).logits, before)
    gw.merge(model)
    close(model(x).logits, before, 1e-6)


def test_dora__equals_lora_at_init_of_the_magnitude():
    """With m = |V| the gain is one, and the weight is LoRA's with the same A and B."""
    model, delta, x = layer(alpha=3.0)
    nn.init.normal_(delta.up)
    with torch.no_grad():
        delta.magnitude.copy_((model.site.weight + delta.scale * delta.up @ delta.down).norm(dim=1))
    other = around(nn.Linear(7, 5))
    other.load_state_dict({n: p for n, p in model.state_dict().items() if "graft" not in n})
    (lora,) = gw.graft(other, gw.LoRA(r=2, alpha=3.0, at="linear"), head=False).deltas()
    lora.down.data, lora.up.data = delta.down.data, delta.up.data
    close(model(x), other(x))


def test_dora__the_bias_is_not_rescaled():
    model, delta, x = layer()
    before = model(x)
    assert torch.equal(before, F.linear(x, model.site.weight, model.site.bias))
    with torch.no_grad():
        delta.magnitude += 1.0  # one update of m
    close(model(x), F.linear(x, adapted(model, delta), model.site.bias))
    g = delta.magnitude / model.site.weight.norm(dim=1)
    assert not torch.allclose(model(x), g * before, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_dora__row_norms_of_the_merged_weight_are_the_magnitudes(kind):
    torch.manual_seed(0)
    site = {
        "linear": nn.Linear(7, 5),
        "conv": nn.Conv2d(4, 6, 3, stride=2, groups=2),
        "embedding": nn.Embedding(11, 6),
    }[kind]
    model = around(site, nn.Linear(6, 3) if kind == "embedding" else None)
    adapter = gw.graft(model, gw.DoRA(r=2, at="/site/"), head=False)
    (delta,) = adapter.deltas()
    assert delta.magnitude.shape == (5,) if kind == "linear" else (6,)
    spread(adapter)
    with torch.no_grad():
        delta.magnitude.abs_()
        x = {"linear": torch.randn(2, 7), "conv": torch.randn(2, 4, 8, 8), "embedding": torch.arange(11)}[kind]
        out = model(x)
    gw.merge(model)
    w = model.site.weight
    rows = w.mT if kind == "embedding" else w.flatten(1)
    close(rows.norm(dim=1), delta.magnitude)
    close(model(x), out)


@pytest.mark.parametrize("exact", [False, True])
def test_dora__factored_form_equals_the_formed_weight(exact):
    model, delta, x = layer(exact=exact)
    for p in delta.parameters():
        nn.init.normal_(p)
    close(model(x), F.linear(x, adapted(model, delta), model.site.bias))
    close(delta.weight(model.site.weight), adapted(model, delta))


def test_dora__detached_and_exact_norm_differ_in_the_gradient_only():
    grads, outs = [], []
    for exact in (False, True):
        model, delta, x = layer(exact=exact)
        torch.manual_seed(1)
        for p in delta.parameters():
            nn.init.normal_(p)
        out = model(x)
        out.square().sum().backward()
        grads.append({n: p.grad for n, p in delta.named_parameters()})
        outs.append(out)
        # against autograd through the definition
        named = {n: p.detach().clone().requires_grad_() for n, p in delta.named_parameters()}
        v = model.site.weight + delta.scale * named["up"] @ named["down"]
        norm = v.norm(dim=1) if exact else v.norm(dim=1).detach()
        w = (named["magnitude"] / norm)[:, None] * v
        F.linear(x, w, model.site.bias).square().sum().backward()
        for n, p in named.items():
            close(grads[-1][n], p.grad, 1e-4)
    assert torch.equal(*outs)
    assert not torch.allclose(grads[0]["down"], grads[1]["down"], atol=1e-3)
    close(grads[0]["magnitude"], grads[1]["magnitude"])


def test_dora__without_a_direction_it_is_a_gain_per_output():
    model, delta, x = layer()
    with torch.no_grad():
        delta.magnitude.normal_()
    g = delta.magnitude / model.site.weight.norm(dim=1)
    close(model(x), g * F.linear(x, model.site.weight) + model.site.bias)


def test_dora__dropout_reaches_what_the_gain_changes():
    model, delta, x = layer(dropout=0.5)
    for p in delta.parameters():
        nn.init.normal_(p)
    model.train()
    torch.manual_seed(2)
    out = model(x)
    torch.manual_seed(2)
    dropped = drop(x, 0.5)
    w, b = model.site.weight, model.site.bias
    v = w + delta.scale * delta.up @ delta.down
    g = delta.magnitude / v.norm(dim=1)
    thin = delta.scale * dropped @ delta.down.T @ delta.up.T
    close(out, F.linear(x, w, b) + (g - 1) * F.linear(dropped, w) + g * thin)


def test_dora__a_row_of_zeros_stays_finite():
    torch.manual_seed(0)
    model = around(nn.Linear(7, 5))
    model.site.weight.data[2] = 0
    x = torch.randn(4, 7)
    before = model(x)
    for exact in (False, True):
        adapter = gw.graft(model, gw.DoRA(r=2, exact=exact, at="linear"), str(exact), head=False)
        assert torch.equal(model(x), before)
        model(x).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


def test_dora__rows_of_a_packed_weight():
    """The fast path on q and v inside GPT-2's packed projection, with its gradients, is the adapted weight."""
    model, x = gpt2(), ids()
    adapter = gw.graft(model, gw.DoRA(r=3, at="q, v"), head=False)
    spread(adapter)
    out = model(x).logits
    out.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    by_hand = gpt2()
    for h in range(2):
        stored = by_hand.transformer.h[h].attn.c_attn.weight
        for role, (a, b) in {"q": (0, 32), "v": (64, 96)}.items():
            delta = adapter.parts[0].deltas[f"transformer.h.{h}.attn.c_attn:{role}"]
            stored.data[:, a:b] = adapted(None, delta, stored.data[:, a:b].T).T.detach()
    close(out, by_hand(x).logits)


def test_dora__experts():
    model, x = mixtral(), ids()
    adapter = gw.graft(model, gw.DoRA(r=2, at="expert.gate_up, expert.down"), head=False)
    spread(adapter, 0.5)
    key = "model.layers.0.mlp.experts:expert.down:down_proj"
    delta = adapter.parts[0].deltas[key]
    assert delta.magnitude.shape == (4, 16)
    w = dense(model, key)
    each = torch.stack([adapted(None, _expert(delta, e), w[e]) for e in range(4)])
    close(delta.weight(w), each)
    out = model(x).logits
    gw.merge(model)
    close(model(x).logits, out)


def _expert(delta, e):
    """The share of one expert, as a delta of its own."""
    alone = nn.Module()
    alone.up, alone.down, alone.magnitude = (nn.Parameter(p[e]) for p in (delta.up, delta.down, delta.magnitude))
    alone.scale = delta.scale
    return alone


def test_dora__counts():
    """LLaMA-7B: 56,975,360 at r = 32; the paper's 0.43 % at r = 16."""
    model = llama_of(4096, 32, 32, 11008)
    base = sum(p.numel() for p in model.parameters())
    at = "q, k, v, up, down"
    assert counts(model, gw.LoRA(r=32, at=at)) == (56_098_816, 56_098_816)
    assert counts(model, gw.DoRA(r=32)) == (56_975_360, 56_975_360)
    half, said = counts(model, gw.DoRA(r=16))
    assert half == said
    assert 100 * half / (base + half) == pytest.approx(0.43, abs=0.005)
