"""Lei et al. 2023: a router keeps k of n tokens for the frozen layer, all tokens pass a light adapter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, bert_of, gpt2, ids, images, llama, spread, t5, t5_base, vit
from torch.utils.flop_counter import FlopCounterMode
from weight_models import counts

import graftwork as gw
from graftwork.methods.block.forms.conditional import Choice
from graftwork.methods.block.forms.soft_topk import exact, iterated

pytestmark = pytest.mark.system("coda")


def scores(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(make=vit, seed=0, **options):
    """A model with the method, its parameters away from their start, and its choices."""
    model = make()
    adapter = gw.graft(model, gw.CoDA(**{"m": 5, "reduction": 2.0, **options}), "a", head=False, seed=seed)
    spread(adapter)
    choices = [d for d in adapter.deltas() if isinstance(d, Choice)]
    return model, adapter, choices


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.02])
def test_coda__soft_top_k(eps):
    s = scores(50, 30)
    for solve in (exact, iterated):
        weights = solve(s, 10, eps)
        assert (weights >= 0).all() and (weights <= 1).all()
        ordered = weights.gather(-1, s.argsort(-1))
        assert (ordered.diff() >= 0).all()
    torch.testing.assert_close(exact(s, 10, eps).sum(-1), torch.full((50,), 10.0).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(exact(s.float(), 10, eps).sum(-1), torch.full((50,), 10.0), atol=1e-4, rtol=0)
    assert torch.equal(exact(s, 30, eps), torch.ones_like(s))


def test_coda__the_exact_solver_solves_it():
    """No feasible point of a grid has a larger s^T l + eps H(l); and eps -> 0 gives the hard indicator."""
    s, eps = torch.tensor([0.9, 0.3, -0.4], dtype=torch.float64), 0.5

    def value(weights):
        return (s * weights).sum(-1) - eps * torch.xlogy(weights, weights).sum(-1)

    steps = torch.linspace(0, 1, 201, dtype=torch.float64)
    grid = torch.tensor(
        [(a, b, 2 - a - b) for a, b in itertools.product(steps.tolist(), repeat=2) if 0 <= 2 - a - b <= 1]
    )
    best = value(exact(s, 2, eps))
    assert (value(grid.double()) <= best + 1e-9).all()
    assert (value(grid.double()).max() - best).abs() < 1e-3
    hard = scores(20, 12)
    top = torch.zeros_like(hard).scatter(-1, hard.topk(5).indices, 1.0)
    gap = hard.sort(-1, descending=True).values
    apart = (gap[:, 4] - gap[:, 5]) > 0.01
    torch.testing.assert_close(exact(hard, 5, 1e-4)[apart], top[apart], atol=1e-6, rtol=0)


def test_coda__the_iteration_tends_to_the_exact_solution():
    s = scores(20, 30)
    torch.testing.assert_close(iterated(s, 10, 0.1, rounds=200), exact(s, 10, 0.1), atol=1e-4, rtol=0)
    torch.testing.assert_close(iterated(s, 10, 1.0), exact(s, 10, 1.0), atol=1e-3, rtol=0)
    gap = (iterated(s, 10, 0.02).sum(-1) - 10).abs().max()
    assert gap > 0.5  # 20 rounds are not enough for a small eps


@pytest.mark.parametrize("solver", ["iterated", "exact"])
def test_coda__gradients_match_finite_differences(solver):
    s = scores(4, 9).requires_grad_()
    solve = {"iterated": iterated, "exact": exact}[solver]
    assert torch.autograd.gradcheck(lambda t: solve(t, 3, 0.5), s)


@pytest.mark.parametrize("attention", ["k-to-all", "k-to-k"])
def test_coda__the_gradient_of_the_router(attention):
    """Through the 20 rounds and the layer: as differences say, and not zero."""
    model, _, choices = adapted(eps=0.5, attention=attention)
    model.double()
    x = images().double()
    w = choices[0].weight
    loss = model(x).logits.square().sum()
    (found,) = torch.autograd.grad(loss, w)
    assert found.abs().max() > 1e-6
    direction = scores(*w.shape, seed=3)
    values = []
    with torch.no_grad():
        for h in (1e-5, -1e-5):
            w.add_(h * direction)
            values.append(model(x).logits.square().sum())
            w.sub_(h * direction)
    torch.testing.assert_close((found * direction).sum(), (values[0] - values[1]) / 2e-5, atol=1e-6, rtol=1e-4)


def heavy(layer, x, index, attention):
    """What a ViT block adds to the chosen tokens of x [n, d], and what the adapter is given."""
    h = layer.layernorm_before(x)
    a = layer.attention
    q, k, v = (p(h).unflatten(-1, (4, 8)).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
    if attention == "k-to-k":
        k, v = k[:, index], v[:, index]
    out = F.scaled_dot_product_attention(q[:, index], k, v).transpose(0, 1).flatten(1)
    first = a.o_proj(out)
    y = x[index] + first
    return first + layer.mlp(layer.layernorm_after(y)), h


@pytest.mark.parametrize("attention", ["k-to-all", "k-to-k"])
@torch.no_grad()
def test_coda__is_the_equation(attention):
    model, _, choices = adapted(attention=attention, eps=0.3)
    x = scores(2, 5, 32).float()
    model.vit.embeddings.forward = lambda *args, **kwargs: x
    out = model.vit(images(), output_hidden_states=True).hidden_states[1]
    choice, layer = choices[0], model.vit.layers[0]
    gw.activate(model, None)
    for row in range(2):
        s = (x[row] @ choice.weight[0]).double()
        weights = iterated(s, 3, 0.3)
        index = s.topk(3).indices
        added, h = heavy(layer, x[row], index, attention)
        a = choice.adapter
        expected = x[row] + F.relu(h @ a.down.T + a.down_bias) @ a.up.T + a.up_bias
        expected[index] += weights[index, None].float() * added
        torch.testing.assert_close(out[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (vit, {"pixel_values": images()}),
        (bert, {"input_ids": ids()}),
        (llama, {"input_ids": ids()}),
        (gpt2, {"input_ids": ids()}),
        (t5, {"input_ids": ids(), "decoder_input_ids": ids(seq=4)}),
    ],
)
@pytest.mark.parametrize("attention", ["k-to-all", "k-to-k"])
@torch.no_grad()
def test_coda__all_tokens_with_weight_one_is_the_dense_layer(make, inputs, attention):
    """k = n: the exact solver gives lambda = 1; with a zero adapter it is the backbone, and the adapter comes on top."""
    model = make()
    base = model(**inputs)[0]
    gw.graft(model, gw.CoDA(m=5, reduction=1.0, solver="exact", attention=attention), "a", head=False)
    torch.testing.assert_close(model(**inputs)[0], base, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_coda__all_tokens_are_the_dense_layer_and_a_parallel_adapter():
    model, _, choices = adapted(reduction=1.0, solver="exact")
    x = scores(2, 5, 32).float()
    model.vit.embeddings.forward = lambda *args, **kwargs: x
    layer, a = model.vit.layers[0], choices[0].adapter
    found = model.vit(images(), output_hidden_states=True).hidden_states[1]
    gw.activate(model, None)
    dense = model.vit(images(), output_hidden_states=True).hidden_states[1]
    h = layer.layernorm_before(x)
    edit = F.relu(h @ a.down.T + a.down_bias) @ a.up.T + a.up_bias
    torch.testing.assert_close(found, dense + edit, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attention", ["k-to-all", "k-to-k"])
@torch.no_grad()
def test_coda__heavy_layers_see_exactly_k_rows(attention):
    """Query, output and feed-forward of both layers; keys and values are made of all tokens in k-to-all. And the pooler."""
    model, _, _ = adapted(bert, attention=attention, reduction=3.0)
    real = F.linear
    rows = []

    def counted(x, w, b=None):
        rows.append((tuple(w.shape), x.shape[:-1].numel()))
        return real(x, w, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counted)
        model(input_ids=ids(seq=8))
    k = 2 * math.ceil(8 / 3)
    keys = 16 if attention == "k-to-all" else k
    assert [n for shape, n in rows if shape in ((64, 32), (32, 64))] == [k] * 4
    assert [n for shape, n in rows if shape == (32, 32)] == [k, keys, keys, k] * 2 + [2]


@torch.no_grad()
def test_coda__other_tokens_depend_on_themselves_alone():
    """k-to-k: neither do chosen tokens see the others, nor the others anything but themselves."""
    model, _, choices = adapted(attention="k-to-k")
    x = scores(1, 5, 32).float()
    now = {"x": x}
    model.vit.embeddings.forward = lambda *args, **kwargs: now["x"]

    def layer():
        return model.vit(images(1), output_hidden_states=True).hidden_states[1][0]

    before = layer()
    s = x[0] @ choices[0].weight[0]
    chosen = set(s.topk(3).indices.tolist())
    other = next(i for i in range(5) if i not in chosen)
    moved = torch.randn(32, generator=torch.Generator().manual_seed(9))
    w = choices[0].weight[0]
    moved = moved - (moved @ w) / (w @ w) * w  # its score stays
    now["x"] = x.clone()
    now["x"][0, other] += moved
    after = layer()
    changed = {i for i in range(5) if not torch.allclose(before[i], after[i], atol=1e-6)}
    assert changed == {other}


@torch.no_grad()
def test_coda__padding_is_chosen_last_and_changes_nothing():
    model, _, _ = adapted(t5, reduction=2.0)
    real = ids(1, 6)
    padded = torch.cat([real, torch.zeros(1, 6, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(real), torch.zeros_like(real)], 1)
    decoder = ids(1, 3)
    seen = []
    for d in [d for d in gw.adapters(model)["a"].deltas() if isinstance(d, Choice)]:
        of = d.chosen
        d.chosen = lambda x, outer, of=of: seen.append(of(x, outer)[1]) or of(x, outer)
    model(input_ids=padded, attention_mask=mask, decoder_input_ids=decoder)
    assert len(seen) == 2  # the encoder's layers; the decoder is dense
    assert all((index < 6).all() for index in seen)


@torch.no_grad()
def test_coda__floating_point_operations_are_saved():
    """Of every linear layer, all those of the two thirds of the tokens that are not chosen."""
    model = bert(2)
    x = ids(2, 30)
    with FlopCounterMode(display=False) as dense:
        model(x)
    adapter = gw.graft(model, gw.CoDA(m=2, reduction=3.0, attention="k-to-k"), head=False)
    with FlopCounterMode(display=False) as some:
        model(x)
    d, tokens, k = 32, 60, 20
    linear = 2 * (4 * d * d + 2 * d * 64)
    extra = 2 * 2 * tokens * (2 * d * 2 + d)  # adapters and routers, two layers
    assert dense.get_total_flops() - some.get_total_flops() == 2 * linear * (tokens - k) - extra
    assert adapter.num_parameters == 2 * (2 * 2 * d + 2 + d + d)


def test_coda__generation():
    """An encoder may choose; among tokens in a cache nothing can be chosen."""
    model, _, _ = adapted(t5)
    given = {"input_ids": ids(), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**given, use_cache=True), model.generate(**given, use_cache=False))
    model, _, _ = adapted(llama)
    with pytest.raises(gw.GraftError, match="cache"):
        model.generate(**given, use_cache=True)
    assert model.generate(**given, use_cache=False).shape == (2, 11)


def test_coda__parameters():
    made, said = counts(bert_of("base"), gw.CoDA())
    assert made == said == 12 * (2 * 64 * 768 + 64 + 768 + 768)
    model = t5_base()
    made, said = counts(model, gw.CoDA())
    assert made == said == 12 * (2 * 64 * 768 + 64 + 768 + 768)
    assert made / sum(p.numel() for p in model.parameters()) == pytest.approx(0.005, abs=0.001)  # the paper: about 0.4%


@pytest.mark.parametrize(
    ("make", "options", "what"),
    [
        (bert, {"at": "block, linear"}, "0 attention modules"),
        (bert, {"reduction": 0.5}, "reduction"),
        (vit, {"eps": 0.0}, "eps"),
        (vit, {"solver": "newton"}, "solver"),
        (t5, {"at": "decoder.block, decoder.attn"}, "nothing to do"),
    ],
)
def test_coda__bad_input_is_refused(make, options, what):
    model = make()
    with pytest.raises(gw.GraftError, match=what):
        gw.graft(model, gw.CoDA(**options), head=False)
    assert not gw.adapters(model)
