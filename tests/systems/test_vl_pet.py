"""Hu et al. 2023: encoder adapters under a gate of chosen granularity, and a small adapter on the decoder's values."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bart_large, bert, closed_form, ids, spread, t5, t5_base, vit
from modal_models import bart

import graftwork as gw

pytestmark = pytest.mark.system("vl-pet")
GATES = ("large", "middle_x", "middle_y", "small")


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=ids(), decoder_input_ids=ids(seed=5), **more).logits


def one(gate: str, **how):
    """The delta at one sub-layer of BERT, with an input and an output of it."""
    model = bert(layers=1)
    adapter = gw.graft(model, gw.VLPETEncoder(d=8, gate=gate, gate_dim=6, at="mlp", **how), head=False)
    spread(adapter)
    generator = torch.Generator().manual_seed(4)
    return next(adapter.deltas()), *(torch.randn(3, 5, 32, generator=generator) for _ in "xy")


def test_vl_pet__heads_are_a_reparametrisation():
    outputs = []
    for heads in (1, 2, 4, 8):
        delta, x, y = one("large", heads=heads)
        delta.down.data = torch.linspace(-1, 1, 8 * 32).view(heads, 8 // heads, 32)
        assert sum(p.numel() for p in delta.parameters()) == 2 * 8 * 32 + 8 + 32 + 2 * 6 * 32 + 6 + 32
        inner = torch.cat([y @ d.T for d in delta.down], -1) + delta.down_bias  # each head by itself
        whole = y + torch.nn.functional.gelu(inner, approximate="tanh") @ delta.up.T + delta.up_bias
        gate = torch.nn.functional.gelu(x @ delta.gate_down.T + delta.gate_down_bias, approximate="tanh")
        gate = torch.sigmoid(gate @ delta.gate_up.T + delta.gate_bias)
        torch.testing.assert_close(delta(x, y), gate * whole, atol=1e-5, rtol=1e-5)
        outputs.append(delta(x, y))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_vl_pet__shapes_of_the_gates_and_their_equations():
    shapes = {"large": (3, 5, 32), "middle_x": (3, 5, 1), "middle_y": (32,), "small": (3, 1, 1)}
    for gate in GATES:
        delta, x, y = one(gate)
        whole = y + torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(6))
        opened = delta.opened(x, y, whole)
        assert opened.shape == shapes[gate]
        if gate == "middle_x":
            torch.testing.assert_close(opened[..., 0], torch.sigmoid((x + y) @ delta.gate_up[0] + delta.gate_bias))
        if gate == "small":
            each = torch.sigmoid(torch.cat([x, whole], -1) @ delta.gate_up[0] + delta.gate_bias)
            torch.testing.assert_close(opened[:, 0, 0], each.mean(1))


def test_vl_pet__a_channel_gate_at_zero_is_the_identity_and_a_large_one_halves():
    for gate, share in (("middle_y", 1.0), ("large", 0.5)):
        delta, x, y = one(gate)
        for name, p in delta.named_parameters():
            if name in ("up", "up_bias", "gate_up", "gate_bias", "gate_down", "gate_down_bias"):
                p.data.zero_()
        assert torch.equal(delta(x, y), share * y)


@pytest.mark.parametrize("make", [bart, t5])
def test_vl_pet__the_decoders_adapter_leaves_attention_maps_alone(make):
    model = make(layers=1)
    model.set_attn_implementation("eager")
    base = model(input_ids=ids(), decoder_input_ids=ids(seed=5), output_attentions=True)
    _, values, _ = gw.VLPET()
    adapter = gw.graft(model, values, head=False)
    assert [s.path.rpartition(".")[2] for s in adapter.sites] == (["v_proj"] if make is bart else ["v"])
    spread(adapter)
    out = model(input_ids=ids(), decoder_input_ids=ids(seed=5), output_attentions=True)
    for one_map, other in zip(out.cross_attentions, base.cross_attentions, strict=True):
        assert torch.equal(one_map, other)
    assert not torch.allclose(out.logits, base.logits, atol=1e-3)


def test_vl_pet__the_decoders_values_by_hand():
    model = bart(layers=1)
    attention = model.model.decoder.layers[0].encoder_attn
    adapter = gw.graft(model, gw.VLPET(decoder_scale=0.3)[1], head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    seen = {}
    handle = attention.v_proj.register_forward_hook(lambda m, args, out: seen.update(k=args[0], v=out))
    logits(model)
    handle.remove()
    with torch.no_grad(), gw.using(model, None):
        k = seen["k"]
        inner = torch.nn.functional.gelu(k @ delta.down.T + delta.down_bias, approximate="tanh")
        expected = attention.v_proj(k) + 0.3 * (inner @ delta.up.T + delta.up_bias)
    torch.testing.assert_close(seen["v"], expected, atol=1e-5, rtol=1e-5)


def test_vl_pet__padding_changes_nothing_under_the_small_gate():
    model = bert().bert
    adapter = gw.graft(model, gw.VLPETEncoder(d=8, gate="small"), head=False)
    spread(adapter, 1.0)
    with torch.no_grad():
        alone = model(ids(seq=5), attention_mask=torch.ones(2, 5).long()).last_hidden_state
        padded = torch.cat([ids(seq=5), ids(seq=3, seed=9)], 1)
        mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
        beside = model(padded, attention_mask=mask).last_hidden_state[:, :5]
        torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-5)
        unmasked = model(padded).last_hidden_state[:, :5]
    assert not torch.allclose(unmasked, alone, atol=1e-3)


def test_vl_pet__places_and_counts_of_bart_and_t5():
    d, layers = 1024, 12
    gates = {"large": 2 * 96 * d + 96 + d, "middle_x": d + 1, "middle_y": d, "small": 2 * d + 1}
    for gate, numbers in gates.items():
        encoder, values = gw.VLPET(gate=gate, norms=False)
        assert closed_form(bart_large(), [encoder]) == layers * 2 * (2 * 96 * d + 96 + d + numbers)
        assert closed_form(bart_large(), [values]) == layers * (2 * 96 * d + 96 + d)
    model = t5_base()
    adapter = gw.graft(model, gw.VLPET(d=192, source="residual", decoder_scale=0.3), head=False)
    assert [len(part.sites) for part in adapter.parts] == [24, 12, 25]
    assert {site.tower for part in (adapter.parts[0], adapter.parts[2]) for site in part.sites} == {"encoder"}
    assert adapter.num_parameters == closed_form(t5_base(), gw.VLPET(d=192))


@pytest.mark.parametrize("gate", GATES)
def test_vl_pet__all_of_it_learns(gate):
    model = t5()
    adapter = gw.graft(model, gw.VLPET(d=8, gate=gate, source="residual"), head=False, seed=0)
    assert all(0.01 < d.up.std() < 0.03 for d in adapter.parts[0].deltas.values())
    assert not torch.equal(logits(model), logits(t5())) or gate == "middle_y"
    model.train()
    model(input_ids=ids(), labels=ids(seed=5)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_vl_pet__x_is_the_residual_stream_where_that_is_asked_for():
    """In a pre-norm ViT the two differ by the layer's norm."""
    outputs = []
    for source in ("entry", "residual"):
        model = vit(layers=1)
        adapter = gw.graft(model, gw.VLPETEncoder(d=8, source=source, at="mlp"), head=False)
        spread(adapter)
        (delta,), seen = adapter.deltas(), {}
        block = model.vit.layers[0]
        block.layernorm_after.register_forward_hook(lambda m, args, out, seen=seen: seen.update(r=args[0], x=out))
        block.mlp.fc2.register_forward_hook(lambda m, args, out, seen=seen: seen.update(z=args[0], y=out))
        with torch.no_grad():
            outputs.append(model(torch.ones(1, 3, 8, 8)).logits)
            expected = delta(seen["r" if source == "residual" else "x"], torch.nn.functional.linear(
                seen["z"], block.mlp.fc2.weight, block.mlp.fc2.bias
            ))  # fmt: skip
            torch.testing.assert_close(seen["y"], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*outputs)


def test_vl_pet__what_makes_no_sense_is_refused():
    with pytest.raises(gw.GraftError, match="do not divide"):
        gw.VLPETEncoder(d=96, heads=5)
    model = bart()
    for method, reason in (
        (gw.VLPETEncoder(gate="small", at="decoder.mlp"), "the attention mask is the encoder's"),
        (gw.VLPETEncoder(gate="middle_x", at="down"), "an input of 64 and an output of 32"),
    ):
        with pytest.raises(gw.GraftError, match=reason):
            gw.graft(model, method, head=False)
    assert gw.adapters(model) == {}
