"""Liu et al. 2022: (IA)^3 rescales keys, values and inner activations; the three-term loss of T-Few."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama, spread, t5
from torch import nn
from weight_models import counts, gpt2, t0

import graftwork as gw
from graftwork.objectives.tfew import choice_scores, predict, tfew_loss, token_nll

pytestmark = pytest.mark.system("ia3")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def run(model, x):
    """The logits; an encoder-decoder is given the same tokens on both sides."""
    return (model(x, decoder_input_ids=x) if model.config.is_encoder_decoder else model(x)).logits


class Ungated(nn.Module):
    """Blocks with a ReLU feed-forward, named as the anatomy expects."""

    def __init__(self, d: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(d, inner), "fc2": nn.Linear(inner, d)}) for _ in "12"
        )

    def forward(self, x):
        for block in self.layers:
            x = x + block["fc2"](torch.relu(block["fc1"](x)))
        return x


@pytest.mark.parametrize("make", [bert, llama, gpt2, t5])
def test_ia3__ones_change_no_bit_and_merge_equals_forward(make):
    """BERT and GPT-2 have biases on keys and values: a merge that leaves them out fails."""
    model, x = make(), ids()
    with torch.no_grad():  # with gradients, T5's trainable position bias takes another attention kernel before grafting
        before = run(model, x)
        adapter = gw.graft(model, gw.IA3(), head=False)
        assert torch.equal(run(model, x), before)
    spread(adapter, 1.0)
    run(model, x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    with torch.no_grad():
        out = run(model, x)
        assert not torch.allclose(out, before, atol=1e-4)
        gw.merge(model)
        close(run(model, x), out)
        gw.unmerge(model)
        assert torch.equal(run(model, x), out)


def test_ia3__keys_and_values_with_their_bias():
    model = bert(layers=1)
    adapter = gw.graft(model, gw.IA3(at="k, v"), head=False)
    spread(adapter, 1.0)
    attention = model.bert.encoder.layer[0].attention.self
    h = torch.randn(2, 5, 32)
    for delta, linear in zip(adapter.deltas(), (attention.key, attention.value), strict=True):
        with gw.using(model, None):
            plain = linear(h)
        assert plain.abs().max() > 0
        assert linear.bias.abs().max() > 0
        close(linear(h), delta.scale * plain)


def test_ia3__ungated_mlp_is_scaled_behind_the_non_linearity():
    torch.manual_seed(0)
    model, x = Ungated(), torch.randn(3, 6)
    adapter = gw.graft(model, gw.IA3(at="down"), head=False)
    for delta in adapter.deltas():
        assert delta.scale.shape == (8,)
        nn.init.normal_(delta.scale)
        assert (delta.scale < 0).any()
    expected, before_relu = x, x
    for block, delta in zip(model.layers, adapter.deltas(), strict=True):
        w1, w2 = block["fc1"], block["fc2"]
        h = F.linear(expected, w1.weight, w1.bias)
        expected = expected + F.linear(delta.scale * F.relu(h), w2.weight, w2.bias)
        h = F.linear(before_relu, w1.weight, w1.bias)
        before_relu = before_relu + F.linear(F.relu(delta.scale * h), w2.weight, w2.bias)
    close(model(x), expected)
    assert not torch.allclose(model(x), before_relu, atol=1e-3)
    gw.merge(model)
    close(model(x), expected)


def test_ia3__default_sites_of_an_ungated_model_are_the_inputs_of_down():
    model = bert()
    adapter = gw.graft(model, gw.IA3(), head=False)
    assert {d.scale.shape[0] for s, d in zip(adapter.sites, adapter.deltas(), strict=True) if s.role == "down"} == {64}
    assert adapter.num_parameters == 2 * (32 + 32 + 64) == 256


def test_ia3__gated_mlp_on_the_linear_branch_equals_the_product():
    """The output of wi_1 (up) scaled, the paper's place, is the input of down scaled: same vectors, same model."""
    outs = []
    for at in ("k, v, down", "k, v, up"):
        model = llama()
        spread(gw.graft(model, gw.IA3(at=at), head=False), 1.0)
        outs.append(model(ids()).logits)
    close(*outs)


def test_ia3__counts():
    for size, expected in (("3b", 540_672), ("11b", 1_081_344)):
        assert counts(t0(size), gw.IA3()) == (expected, expected)
        assert counts(t0(size), gw.IA3(at="k, v, up")) == (expected, expected)


# --- the loss of T-Few ------------------------------------------------------------------------------------------------


def case(pad: int = 0):
    """Two choices of 1 and 4 tokens, given by the probabilities of their tokens; the longer one is right."""
    p = torch.ones(1, 2, 4 + pad)
    p[0, 0, :1] = torch.tensor([0.3])
    p[0, 1, :4] = torch.tensor([0.9, 0.5, 0.8, 0.4])
    p[0, 0, 1:], p[0, 1, 4:] = 0.123, 0.456  # what a model says about padding
    real = torch.zeros(1, 2, 4 + pad, dtype=torch.bool)
    real[0, 0, :1], real[0, 1, :4] = True, True
    return -p.log(), real


def test_ia3__tfew_loss_equals_hand_values():
    nll, real = case()
    loss = tfew_loss(nll, real, torch.tensor([1]))
    logs = [math.log(p) for p in (0.9, 0.5, 0.8, 0.4)]
    assert loss.lm.item() == pytest.approx(-sum(logs) / 4)
    assert loss.unlikelihood.item() == pytest.approx(-math.log(1 - 0.3 + 1e-2))
    s = [math.log(0.3), sum(logs) / 4]
    expected = -s[1] + math.log(math.exp(s[0]) + math.exp(s[1]))
    assert loss.choice.item() == pytest.approx(expected)
    assert loss.total.item() == pytest.approx(loss.lm.item() + loss.unlikelihood.item() + expected)
    other = tfew_loss(nll, real, torch.tensor([0]))
    assert other.lm.item() == pytest.approx(-math.log(0.3))
    assert other.unlikelihood.item() == pytest.approx(-sum(math.log(1 - p + 1e-2) for p in (0.9, 0.5, 0.8, 0.4)) / 4)


def test_ia3__tfew_loss_ignores_padding():
    terms = []
    for pad in (0, 3):
        nll, real = case(pad)
        nll.requires_grad_()
        loss = tfew_loss(nll, real, torch.tensor([1]))
        loss.total.backward()
        assert torch.isfinite(nll.grad).all()
        assert not nll.grad[~real].any()
        terms.append(torch.stack([loss.lm, loss.unlikelihood, loss.choice]).detach())
    close(*terms, 1e-7)


def test_ia3__tfew_loss_in_a_batch_with_fewer_choices():
    """An example with two choices beside one with three: its loss is what it is alone."""
    nll, real = case()
    wide_nll, wide = torch.full((1, 3, 4), 7.0), torch.zeros(1, 3, 4, dtype=torch.bool)
    wide_nll[:, :2], wide[:, :2] = nll, real
    a, b = (tfew_loss(n, r, torch.tensor([1])) for n, r in ((nll, real), (wide_nll, wide)))
    assert a.total.item() == pytest.approx(b.total.item())


def test_ia3__length_norm_decides_between_a_short_and_a_long_choice():
    nll, real = case()
    assert choice_scores(nll, real, 0.0)[0].tolist() == pytest.approx([math.log(0.3), math.log(0.9 * 0.5 * 0.8 * 0.4)])
    assert predict(nll, real, length_norm=0.0).tolist() == [0]
    assert predict(nll, real, length_norm=1.0).tolist() == [1]


def test_ia3__tfew_trains_a_model_to_choose():
    """Random labels of a tiny T5, learned by the vectors alone through the whole loss."""
    torch.manual_seed(0)
    model, x = t5(), ids(batch=4, seq=6)
    choices = torch.tensor([[[11, 0, 0], [12, 13, 0], [14, 15, 16]]]).expand(4, 3, 3)
    real, label = choices != 0, torch.tensor([0, 2, 1, 2])
    adapter = gw.graft(model, gw.IA3(), head=False)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=0.1)

    def nll():
        start = F.pad(choices, (1, 0))[..., :-1].flatten(0, 1)
        logits = model(x.repeat_interleave(3, 0), decoder_input_ids=start).logits
        return token_nll(logits.view(4, 3, 3, -1), choices)

    losses = []
    for _ in range(60):
        loss = tfew_loss(nll(), real, label).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert predict(nll(), real).tolist() == label.tolist()


def test_ia3__inputs_of_a_slice_of_a_packed_weight():
    """q and v inside GPT-2's packed projection, each with an input of its own: the fast path is the merged weight."""
    model, x = gpt2(), ids()
    before = model(x).logits
    spread(gw.graft(model, gw.IA3(side="input", at="q, v"), head=False))
    out = model(x).logits
    assert (out - before).abs().max() > 1e-4
    gw.merge(model)
    torch.testing.assert_close(model(x).logits, out, atol=1e-6, rtol=1e-5)
