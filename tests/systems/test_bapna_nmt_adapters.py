"""Bapna and Firat 2019: one adapter with its own norm after every layer of a translation model."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bart_large, closed_form, ids, llama, spread, t5

import graftwork as gw

pytestmark = pytest.mark.system("bapna-nmt-adapters")


def test_bapna_nmt_adapters__input_is_normalised_and_the_residual_is_not():
    model = llama(layers=1)
    adapter = gw.graft(model, gw.Pfeiffer(d=4), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    z = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        added = delta(z, z) - z
        for c in (0.5, 40.0):
            torch.testing.assert_close(delta(z, c * z) - c * z, added, atol=2e-4, rtol=1e-4)
        # by hand, with the unnormalised residual
        normed = torch.nn.functional.layer_norm(z, (32,), delta.norm_weight, delta.norm_bias)
        by_hand = z + torch.relu(normed @ delta.down.T + delta.down_bias) @ delta.up.T + delta.up_bias
        torch.testing.assert_close(delta(z, z), by_hand)


def test_bapna_nmt_adapters__zero_up_is_the_identity_for_any_norm():
    model = t5()
    x, y = ids(), ids(seed=5)
    with torch.no_grad():
        base = model(input_ids=x, decoder_input_ids=y).logits
        adapter = gw.graft(model, gw.Pfeiffer(d=4), head=False)
        spread(adapter)
        for delta in adapter.deltas():
            delta.up.zero_()
            delta.up_bias.zero_()
        assert torch.equal(model(input_ids=x, decoder_input_ids=y).logits, base)
        delta.up.add_(0.1)
        assert not torch.allclose(model(input_ids=x, decoder_input_ids=y).logits, base)


def test_bapna_nmt_adapters__training_one_task_leaves_the_other():
    model = t5()
    a = gw.graft(model, gw.Pfeiffer(d=4), "de-en", head=False)
    b = gw.graft(model, gw.Pfeiffer(d=4), "fr-en", head=False)
    before = {k: v.clone() for k, v in a.state_dict().items()}
    start = {k: v.clone() for k, v in b.state_dict().items()}
    optimiser = torch.optim.Adam([*a.parameters(), *b.parameters()], lr=0.1)
    model(input_ids=ids(), labels=ids(seed=5)).loss.backward()
    optimiser.step()
    assert all(torch.equal(before[k], v) for k, v in a.state_dict().items())
    assert any(not torch.equal(start[k], v) for k, v in b.state_dict().items())


def test_bapna_nmt_adapters__only_the_hidden_state_of_a_tuple_changes_and_decoding_agrees():
    model = t5()
    x, y = ids(), ids(seq=6, seed=5)
    adapter = gw.graft(model, gw.Pfeiffer(d=4), head=False)
    spread(adapter)
    blocks = [model.decoder.block[0]]
    seen = {}

    def record(module, args, output):
        seen["out"] = output

    with torch.no_grad():
        handle = blocks[0].register_forward_hook(record)
        model(input_ids=x, decoder_input_ids=y)
        grafted = seen["out"]
        with gw.using(model, None):
            model(input_ids=x, decoder_input_ids=y)
        plain = seen["out"]
        handle.remove()
        assert isinstance(grafted, tuple) and len(grafted) == len(plain)
        assert not torch.allclose(grafted[0], plain[0])
        full = model(input_ids=x, decoder_input_ids=y).logits
        encoded = model.encoder(input_ids=x)
        past, steps = None, []
        for t in range(y.shape[1]):
            out = model(
                encoder_outputs=encoded, decoder_input_ids=y[:, t : t + 1], past_key_values=past, use_cache=True
            )
            past = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-4)


def test_bapna_nmt_adapters__count_formula_and_a_size_per_task():
    model = bart_large()
    methods = gw.Pfeiffer(d=64)
    per_layer = 2 * 1024 * 64 + 64 + 1024 + 2 * 1024
    assert closed_form(model, methods) == 24 * per_layer
    assert gw.graft(model, methods, "small", head=False).num_parameters == 24 * per_layer
    assert gw.graft(model, gw.Pfeiffer(d=128), "large", head=False).num_parameters == 24 * (
        2 * 1024 * 128 + 128 + 1024 + 2 * 1024
    )
    site = gw.anatomy(t5()).of("block")[0]
    assert gw.Pfeiffer(d=64)[0].count(site) == 2 * 32 * 64 + 64 + 32 + 64
    d = 512  # the catalogue's own numbers
    assert 2 * d * 64 + 64 + d + 2 * d == 67_136
