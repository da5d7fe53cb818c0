"""Lian et al. 2022: every operation of the backbone is scaled and shifted, and folded back into it."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids, images, llama, spread, vit, vit_base
from modal_models import convnext, pictures, speech, swin
from torch import nn
from weight_models import around, counts

import graftwork as gw

pytestmark = pytest.mark.system("ssf")


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def states(model, x):
    with torch.no_grad():
        return model(x).last_hidden_state


@pytest.mark.parametrize("make, x", [(vit, images()), (swin, pictures()), (convnext, pictures())])
def test_ssf__the_folded_model_is_the_unfolded_one(make, x):
    model = make()
    base = logits(model, x)
    adapter = gw.graft(model, gw.SSF(), head=False)
    assert torch.equal(logits(model, x), base)
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5))
    out = logits(model, x)
    assert not torch.allclose(out, base, atol=1e-2)
    gw.merge(model)
    torch.testing.assert_close(logits(model, x), out, atol=1e-5, rtol=1e-5)
    gw.unmerge(model)
    assert torch.equal(logits(model, x), out)


def test_ssf__every_operation_of_a_convolutional_net_is_scaled_and_shifted_by_its_channels():
    """By forward hooks that know each module's channel axis, also where images are as wide as deep."""
    model, x = convnext(), pictures()
    plain = convnext()
    adapter = gw.graft(model, gw.SSF(init="official", init_std=0.3), head=False, seed=0)
    assert {site.path for site in adapter.sites} == {
        name
        for name, m in plain.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.LayerNorm)) and name != "classifier"
    }
    for site in adapter.sites:
        delta = adapter.parts[0].deltas[site.key]
        module = plain.get_submodule(site.path)
        first = isinstance(module, nn.Conv2d) or getattr(module, "data_format", "") == "channels_first"

        def edit(module, args, out, delta=delta, first=first):
            view = (-1, 1, 1) if first else (-1,)
            return out * delta.scale.detach().view(view) + delta.shift.detach().view(view)

        module.register_forward_hook(edit)
    torch.testing.assert_close(logits(model, x), logits(plain, x), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(model, x), logits(convnext(), x), atol=1e-2)


def test_ssf__count_of_vit_b_16():
    assert counts(vit_base(), gw.SSF()) == (205_824, 205_824)
    assert 2 * (768 + 12 * (768 + 2304 + 768 + 768 + 3072 + 768) + 768) == 205_824


def test_ssf__without_shift_it_is_ia3_and_without_scale_it_is_a_bias():
    model, x, at = bert().bert, ids(), "k, v, down"
    for other, name in ((gw.IA3(at=at, side="output"), "scale"), (gw.BitFit(at=at), "shift")):
        ssf = gw.graft(model, gw.SSF(at=at), f"ssf {name}", head=False)
        values = [
            torch.randn(d.scale.shape, generator=torch.Generator().manual_seed(i)) for i, d in enumerate(ssf.deltas())
        ]
        for delta, value in zip(ssf.deltas(), values, strict=True):
            getattr(delta, name).data.copy_(value)
        out = states(model, x)
        peer = gw.graft(model, other, f"peer {name}", head=False)
        for p, value in zip(peer.parameters(), values, strict=True):
            p.data.copy_(value)
        torch.testing.assert_close(out, states(model, x), atol=1e-5, rtol=1e-5)
        with gw.using(model, None):
            assert not torch.allclose(out, states(model, x), atol=1e-2)


def test_ssf__folding_on_a_layer_without_a_bias_makes_one_and_unfolding_takes_it_away():
    model = around(nn.Linear(8, 12, bias=False))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    names = set(model.state_dict())
    adapter = gw.graft(model, gw.SSF(at="/site/"), head=False)
    spread(adapter)
    with torch.no_grad():
        out = model(x)
        gw.merge(model)
        assert {n for n in model.state_dict() if "graft" not in n} - names == {"site.bias"}
        (delta,) = adapter.deltas()
        assert torch.equal(model.site.bias, delta.shift)
        torch.testing.assert_close(model(x), out, atol=1e-6, rtol=1e-6)
        gw.unmerge(model)
        assert model.site.bias is None
        gw.remove(model, "default")
    assert set(model.state_dict()) == names


def test_ssf__official_start_is_near_the_backbone():
    adapter = gw.graft(vit(), gw.SSF(init="official"), head=False, seed=0)
    g = torch.cat([d.scale for d in adapter.deltas()])
    c = torch.cat([d.shift for d in adapter.deltas()])
    assert abs(g.mean() - 1) < 0.01 and 0.015 < g.std() < 0.025
    assert abs(c.mean()) < 0.01 and 0.015 < c.std() < 0.025


def test_ssf__a_norm_without_a_bias_has_its_output_edited_and_is_not_merged():
    model, x = llama(), ids()
    adapter = gw.graft(model, gw.SSF(at="norm"), head=False)
    spread(adapter, 1.0)
    seen = {}
    norm = model.model.layers[0].input_layernorm
    delta = next(d for d in adapter.deltas() if "layers.0.input" in d.key)
    norm.register_forward_hook(lambda m, args, out: seen.update(args=args, out=out))
    logits(model, x)
    with gw.using(model, None), torch.no_grad():
        torch.testing.assert_close(seen["out"], delta.scale * norm(*seen["args"]) + delta.shift)
    with pytest.raises(gw.GraftError, match="changes activations"):
        gw.merge(model)


def test_ssf__where_no_shift_has_a_place_it_is_refused():
    model = around(nn.ConvTranspose1d(8, 8, 2, groups=2))
    with pytest.raises(gw.GraftError, match="rows are not its channels"):
        gw.graft(model, gw.SSF(at="/site/"), head=False)
    assert gw.adapters(model) == {}


def test_ssf__on_speech_and_per_row():
    from modal_models import sound

    model, x = speech(), sound(3)
    adapters = [gw.graft(model, gw.SSF(at="linear"), name, head=False) for name in "ab"]
    for i, adapter in enumerate(adapters):
        with torch.no_grad():
            for p in adapter.parameters():
                p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    each = []
    for name in ("a", "b", None):
        gw.activate(model, name)
        each.append(logits(model, x))
    gw.activate(model, gw.rows(["a", "b", None]))
    expected = torch.stack([each[n][n] for n in range(3)])
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-5)
