"""Fu et al. 2022: a bias behind the feed-forward layer whose strength depends on the token."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, bert_of, closed_form, ids, spread, t5
from modal_models import sound, speech, swin
from torch import nn
from weight_models import around, counts

import graftwork as gw

pytestmark = pytest.mark.system("adapterbias")


def states(model, x):
    with torch.no_grad():
        return model(x).last_hidden_state


def test_adapterbias__in_evaluation_it_is_a_rank_one_update_and_a_bias():
    model, x = bert().bert, ids()
    adapter = gw.graft(model, gw.TokenBias(), head=False)
    spread(adapter)
    out = states(model, x)
    twin = bert().bert
    with torch.no_grad():
        for layer, delta in zip(twin.encoder.layer, adapter.deltas(), strict=True):
            v, (w,), (b,) = delta.shift, delta.own.weight, delta.own.bias
            layer.output.dense.weight += torch.outer(v, w)
            layer.output.dense.bias += b * v
    torch.testing.assert_close(out, states(twin, x), atol=1e-5, rtol=1e-5)
    gw.merge(model)
    torch.testing.assert_close(states(model, x), out, atol=1e-5, rtol=1e-5)
    for layer, other in zip(model.encoder.layer, twin.encoder.layer, strict=True):
        torch.testing.assert_close(layer.output.dense.weight, other.output.dense.weight)
        torch.testing.assert_close(layer.output.dense.bias, other.output.dense.bias)


@pytest.mark.parametrize("reads_from", ["input", "output"])
def test_adapterbias__equation_by_hand(reads_from):
    model = around(nn.Linear(8, 12))
    adapter = gw.graft(model, gw.TokenBias(reads_from=reads_from, at="/site/"), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = nn.functional.linear(x, model.site.weight, model.site.bias)
        z = x if reads_from == "input" else y
        expected = y + (z @ delta.own.weight[0] + delta.own.bias)[..., None] * delta.shift
        torch.testing.assert_close(model(x), expected)
        gw.merge(model)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_adapterbias__without_the_token_it_is_a_bias():
    model, x = bert().bert, ids()
    adapter = gw.graft(model, gw.TokenBias(), head=False)
    bias = gw.graft(model, gw.BitFit(at="down"), "bitfit", head=False)
    for delta, other in zip(adapter.deltas(), bias.deltas(), strict=True):
        value = torch.randn(32, generator=torch.Generator().manual_seed(4))
        delta.shift.data.copy_(value)
        delta.own.weight.data.zero_()
        delta.own.bias.data.fill_(1.0)
        other.shift["bias"].data.copy_(value)
    out = states(model, x)
    gw.activate(model, "default")
    torch.testing.assert_close(states(model, x), out, atol=1e-6, rtol=1e-6)


def test_adapterbias__counts_of_bert():
    base, large = bert_of("base"), bert_of("large")
    assert counts(base, gw.TokenBias()) == (46_092, 46_092)
    assert counts(base, gw.TokenBias(share_alpha=True)) == (12 * 768 + 3072 + 1,) * 2
    assert counts(base, gw.TokenBias(reads_from="output")) == (12 * (2 * 768 + 1),) * 2
    assert closed_form(base, gw.AdapterBias()) == 46_092 + 19_968
    assert closed_form(large, gw.AdapterBias()) == 122_904 + 51_200 == 174_104
    trained = gw.graft(base, gw.AdapterBias(), head=False)
    assert trained.num_parameters == 46_092 + 19_968
    norms = {s.path for s in trained.parts[1].sites}
    assert norms == {"bert.embeddings.LayerNorm", *(f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(12))}
    assert [len(gw.graft(t5(), gw.AdapterBias(), head=False).parts[1].sites)] == [4]  # no norm at its embeddings


def test_adapterbias__the_first_step_moves_the_vector_alone():
    model, x = bert(), ids()
    adapter = gw.graft(model, gw.AdapterBias(norms=False), head=False)
    with torch.no_grad():
        base = bert()(x).logits
        assert torch.equal(model(x).logits, base)
    model(x).logits.square().sum().backward()
    for delta in adapter.deltas():
        assert delta.shift.grad.any()
        assert not delta.own.weight.grad.any() and not delta.own.bias.grad.any()
        assert delta.own.weight.any() and delta.own.weight.abs().max() <= 64**-0.5


def test_adapterbias__one_alpha_for_all_layers_is_stored_once(tmp_path):
    model, x = bert().bert, ids()
    adapter = gw.graft(model, gw.TokenBias(share_alpha=True), head=False)
    spread(adapter)
    assert sorted(n.rpartition("/")[2] for n in adapter.state_dict()) == [
        "alpha.bias",
        "alpha.weight",
        "shift",
        "shift",
    ]
    out = states(model, x)
    gw.save(model, "default", tmp_path)
    twin = bert().bert
    gw.load(twin, tmp_path)
    assert torch.equal(states(twin, x), out)


def test_adapterbias__on_speech_from_the_output():
    model, x = speech(), sound()
    adapter = gw.graft(model, gw.AdapterBias(reads_from="output", norms=False), head=False)
    spread(adapter, 2.0)
    assert {d.key.rpartition(".")[2] for d in adapter.deltas()} == {"output_dense:down"}
    with torch.no_grad():
        out = model(x).logits
        assert not torch.allclose(out, speech()(x).logits, atol=1e-3)
        gw.merge(model)
        torch.testing.assert_close(model(x).logits, out, atol=1e-5, rtol=1e-5)


def test_adapterbias__what_has_no_place_for_it_is_refused():
    model = swin()
    with pytest.raises(gw.GraftError, match="widths 32, 64"):
        gw.graft(model, gw.TokenBias(share_alpha=True), head=False)
    lookup = around(nn.Embedding(8, 12))
    with pytest.raises(gw.GraftError, match="no place for a bias"):
        gw.graft(lookup, gw.TokenBias(at="/site/"), head=False)
    assert gw.adapters(model) == gw.adapters(lookup) == {}
