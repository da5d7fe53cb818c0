"""Steitz and Roth 2024: Adapter+ and its study of positions, initial values and scales."""

from __future__ import annotations

import pytest
import torch
from adapter_models import closed_form, images, spread, vit, vit_base

import graftwork as gw

pytestmark = pytest.mark.system("adapter-plus")
POSITIONS = ("pre", "post", "parallel", "intermediate")


def logits(model):
    with torch.no_grad():
        return model(images()).logits


@pytest.mark.parametrize("r, expected", [(8, 165_984), (1, 36_876), (2, 55_320), (4, 92_208), (16, 313_536)])
def test_adapter_plus__parameter_oracle(r, expected):
    model = vit_base()
    methods = gw.AdapterPlus(r=r)
    assert closed_form(model, methods) == expected
    assert gw.graft(model, methods, head=False).num_parameters == expected


@pytest.mark.parametrize("position", POSITIONS)
def test_adapter_plus__lora_init_is_the_backbone_to_the_bit(position):
    model = vit()
    base = logits(model)
    adapter = gw.graft(model, gw.AdapterPlus(r=4, position=position, init="lora"), head=False)
    assert torch.equal(logits(model), base)
    (delta, *_) = adapter.deltas()
    assert delta.down_bias.abs().max() > 0 and delta.down_bias.abs().max() <= 32**-0.5


def test_adapter_plus__houlsby_init_is_cut_at_two_deviations():
    adapter = gw.graft(vit(), gw.AdapterPlus(r=8), head=False)
    for delta in adapter.deltas():
        assert max(delta.down.abs().max(), delta.up.abs().max()) <= 0.02
        assert delta.down.std() > 0.005 and delta.up.std() > 0.005
        assert not delta.down_bias.any() and not delta.up_bias.any()
        assert torch.equal(delta.scale, torch.ones(32))


def test_adapter_plus__pfeiffer_without_norm_is_post():
    outputs = []
    for methods in (gw.AdapterPlus(r=4), gw.Pfeiffer(d=4, act="gelu", norm="none", init="bert")):
        model = vit()
        adapter = gw.graft(model, methods, head=False)
        spread(adapter)
        for delta in adapter.deltas():
            for name, p in delta.named_parameters():
                generator = torch.Generator().manual_seed(len(name))
                p.data = torch.ones_like(p) if name == "scale" else 0.3 * torch.randn(p.shape, generator=generator)
        outputs.append(logits(model))
    torch.testing.assert_close(*outputs)


def test_adapter_plus__positions_differ_and_follow_their_equations():
    outputs = {}
    for position in POSITIONS:
        model = vit(layers=1)
        adapter = gw.graft(model, gw.AdapterPlus(r=4, position=position), head=False)
        spread(adapter)
        (delta,) = adapter.deltas()
        with torch.no_grad(), gw.using(model, None):
            block, h = model.vit.layers[0], model.vit.embeddings(images())
            y = h + block.attention(block.layernorm_before(h))[0]
            mlp = lambda t, block=block: block.mlp(block.layernorm_after(t))  # noqa: E731
            a = delta.branch
            expected = {
                "pre": lambda: y + a(y) + mlp(y + a(y)),
                "post": lambda: y + mlp(y) + a(y + mlp(y)),
                "parallel": lambda: y + mlp(y) + a(y),
                "intermediate": lambda: y + mlp(y) + a(mlp(y)),
            }[position]()
            expected = model.classifier(model.vit.layernorm(expected)[:, 0])
            wrong = model.classifier(model.vit.layernorm(y + mlp(y) + a(block.layernorm_after(y)))[:, 0])
        outputs[position] = logits(model)
        torch.testing.assert_close(outputs[position], expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(outputs[position], wrong, atol=1e-3)
    for i, one in enumerate(POSITIONS):
        assert all(not torch.allclose(outputs[one], outputs[other], atol=1e-3) for other in POSITIONS[i + 1 :])


def test_adapter_plus__channel_scale_layer_scale_and_folding_agree():
    c = 1.7
    results = []
    for scaling in ("channel", "scalar", "fixed"):
        model = vit()
        adapter = gw.graft(model, gw.Bottleneck(d=4, scaling=scaling, init="houlsby", at="block"), head=False)
        for delta in adapter.deltas():
            for name, p in delta.named_parameters():
                generator = torch.Generator().manual_seed(len(name))
                p.data = torch.full_like(p, c) if name == "scale" else 0.3 * torch.randn(p.shape, generator=generator)
            if scaling == "fixed":
                delta.up.data *= c
                delta.up_bias.data *= c
        results.append(logits(model))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-5, rtol=1e-5)
    # a learned vector folded into U and b_U
    model = vit()
    adapter = gw.graft(model, gw.AdapterPlus(r=4), head=False)
    spread(adapter)
    before = logits(model)
    for delta in adapter.deltas():
        delta.up.data *= delta.scale.data[:, None]
        delta.up_bias.data *= delta.scale.data
        delta.scale.data.fill_(1.0)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_adapter_plus__drop_path_drops_whole_branches():
    model = vit()
    adapter = gw.graft(model, gw.AdapterPlus(r=4, drop_path=0.5), head=False)
    spread(adapter)
    delta = next(adapter.deltas())
    y = torch.randn(64, 5, 32, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    with torch.no_grad():
        branch = delta.eval()(y, y) - y
        trained = delta.train()(y, y) - y
    kinds = []
    for i in range(len(y)):
        dropped = torch.equal(trained[i], torch.zeros_like(trained[i]))
        doubled = torch.allclose(trained[i], 2 * branch[i], atol=1e-5)
        assert dropped != doubled
        kinds.append(dropped)
    assert 10 < sum(kinds) < 54
