"""p-Adapter (Wu et al. 2024): the acceptance checks of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from adapter_models import closed_form, on_meta
from attention_models import batch, make, run, scatter
from torch import Tensor

import graftwork as gw
from graftwork.methods.attention.laplacian import EPS, edges, passed

pytestmark = pytest.mark.system("p-adapter")


def graph(seed: int = 0, queries: int = 5, keys: int = 5) -> tuple[Tensor, Tensor]:
    """A softmax map [2, queries, keys], and nodes [2, keys, 3]."""
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, queries, keys, generator=g)).softmax(-1), torch.randn(2, keys, 3, generator=g)


def plainly(m: Tensor, own: Tensor, nodes: Tensor, p: float) -> Tensor:
    """A' as the paper writes it."""
    difference = own[..., :, None, :] - nodes[..., None, :, :]
    return m * ((m + EPS).sqrt()[..., None] * difference + EPS).norm(dim=-1) ** (p - 2)


def stepped(m: Tensor, own: Tensor, nodes: Tensor, p: float, mu: float) -> Tensor:
    """F' as the paper writes it."""
    edge = plainly(m, own, nodes, p)
    alpha = 1 / (edge.sum(-1) + 2 * mu / p)
    beta = alpha * 2 * mu / p
    return alpha[..., None] * (edge @ nodes) + beta[..., None] * own


def formula(model: Any, delta: Any, h: Tensor, q: Tensor, v: Tensor, m: Tensor, o: Any, **how: float) -> Tensor:
    """The edited attention output h [batch, n, d] of heads q, v [batch, heads, n, d_head] and their map m."""

    def nodes(t: Tensor) -> Tensor:
        f = F.linear(o(t.transpose(1, 2).flatten(2)), delta.down, delta.down_bias)
        return f.unflatten(-1, (m.shape[1], -1)).transpose(1, 2)

    mu = 0.1 * (2 + delta.theta.tanh())
    f = stepped(m, nodes(q), nodes(v), how["p"], mu).transpose(1, 2).flatten(2)
    return h + F.linear(F.gelu(F.linear(h, delta.gate_weight, delta.gate_bias)) * f, delta.up, delta.up_bias)


def caught(model: Any, given: dict[str, Any], modules: dict[str, Any]) -> dict[str, Tensor]:
    """What modules give in a pass."""
    seen: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out))
    run(model, given)
    return seen


def heads(t: Tensor, n: int = 4) -> Tensor:
    return t.unflatten(-1, (n, -1)).transpose(1, 2)


@pytest.mark.parametrize("p", [2.0, 1.25])
def test_p_adapter__is_the_formula_on_an_encoder(p: float) -> None:
    given, model = batch("bert", side="right"), make("bert", attn_implementation="eager")
    adapter = gw.graft(model, gw.Laplacian(p=p, layers="0", reduction=4))
    scatter(adapter)
    (delta,) = adapter.deltas()
    attention = model.encoder.layer[0].attention
    places = {"q": attention.self.query, "v": attention.self.value, "h": attention.output.dropout}
    seen = caught(model, given, places)
    plain: Any = make("bert", attn_implementation="eager")
    with torch.no_grad():
        m = plain(**given, output_attentions=True).attentions[0]
        o = plain.encoder.layer[0].attention.output.dense
        mixed = m @ heads(seen["v"])
        base = o(mixed.transpose(1, 2).flatten(2))
        want = formula(model, delta, base, heads(seen["v"]), heads(seen["v"]), m, o, p=p)
    torch.testing.assert_close(seen["h"], want, atol=2e-5, rtol=1e-4)
    if p == 2:  # plain averaging with a weight of its own for the node
        f, mu = torch.randn(2, 4, 6, 3), torch.tensor(0.2)
        torch.testing.assert_close(passed(edges(m, f, f, 2.0), f, f, mu), (m @ f + mu * f) / (1 + mu))
        one = torch.rand(2, 5, 5)
        g = torch.randn(2, 5, 3)
        average = (one @ g + 0.7 * g) / (one.sum(-1, keepdim=True) + 0.7)
        torch.testing.assert_close(passed(edges(one, g, g, 2.0), g, g, 0.7), average)


def test_p_adapter__at_the_start_mu_is_twice_mu0_and_the_output_the_backbones() -> None:
    given, model = batch("bert"), make("bert")
    want = run(model, given)
    adapter = gw.graft(model, "p_adapter(reduction=4)")
    assert [type(part.method) for part in adapter.parts] == [gw.Laplacian, gw.Bottleneck]
    assert torch.equal(run(model, given), want)
    delta: Any = next(iter(adapter.deltas()))
    assert delta.theta.item() == 0  # mu = mu0 (2 + tanh theta)
    scatter(adapter)
    assert (run(model, given) - want).abs().max() > 1e-3


def test_p_adapter__cross_attention_joins_queries_and_values() -> None:
    given, model = batch("bart"), make("bart", attn_implementation="eager")
    for pool in (None, 3):
        adapter = gw.graft(
            model, gw.Laplacian(p=1.5, at="decoder.cross.attn", layers="0", reduction=4, pool=pool), str(pool)
        )
        scatter(adapter)
        (delta,) = adapter.deltas()
        attention = model.model.decoder.layers[0].encoder_attn
        names = {"q": "q_proj", "v": "v_proj", "h": "out_proj"}
        seen = caught(model, given, {k: getattr(attention, name) for k, name in names.items()})
        plain: Any = make("bart", attn_implementation="eager")
        with torch.no_grad():
            m = plain(**given, output_attentions=True).cross_attentions[0]
            o = plain.model.decoder.layers[0].encoder_attn.out_proj
            q, v = heads(seen["q"]), heads(seen["v"])
            base = o((m @ v).transpose(1, 2).flatten(2))
            if pool:  # along the tokens, the map alike
                v, m = v.view(2, 4, pool, -1, 8).mean(3), m.view(2, 4, 5, pool, -1).mean(-1)
            whole = torch.zeros(2, 4, m.shape[2] + m.shape[3], m.shape[2] + m.shape[3])
            whole[:, :, : m.shape[2], m.shape[2] :] = m
            whole[:, :, m.shape[2] :, : m.shape[2]] = m.mT
            both = torch.cat([q, v], 2)  # the whole bipartite graph, of which the queries' rows are taken
            shape = base.new_zeros(2, both.shape[2], 32)
            shape[:, : m.shape[2]] = base
            want = formula(model, delta, shape, both, both, whole, o, p=1.5)[:, : m.shape[2]]
        torch.testing.assert_close(seen["h"], want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("p", [1.0, 1.25, 1.75, 2.0, 3.0])
def test_p_adapter__rows_are_convex_combinations_and_constants_stay(p: float) -> None:
    for queries, own_rows in ((5, slice(None)), (2, slice(3, None))):
        m, nodes = graph(queries=queries)
        own = nodes[:, own_rows]
        edge, share = edges(m, own, nodes, p), torch.tensor(2 * 0.2 / p)
        torch.testing.assert_close(edge, plainly(m, own, nodes, p), atol=1e-6, rtol=1e-4)
        alpha = 1 / (edge.sum(-1) + share)
        torch.testing.assert_close(alpha * edge.sum(-1) + alpha * share, torch.ones_like(alpha))
        ones = torch.full_like(nodes, 0.7)
        constant = passed(edges(m, ones[:, own_rows], ones, p), ones[:, own_rows], ones, share)
        torch.testing.assert_close(constant, ones[:, own_rows])
        low, high = nodes.amin(1, keepdim=True), nodes.amax(1, keepdim=True)
        mixed = passed(edge, own, nodes, share)
        assert ((mixed >= low - 1e-5) & (mixed <= high + 1e-5)).all()


def test_p_adapter__equal_tokens_give_finite_values_and_gradients() -> None:
    m, nodes = graph()
    nodes = nodes[:, [0, 0, 0, 1, 1]].requires_grad_()
    out = passed(edges(m, nodes, nodes, 1.25), nodes, nodes, 0.16)
    out.pow(2).sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(nodes.grad).all() and nodes.grad.any()
    model, given = make("bert"), batch("bert", pad=0)
    given["input_ids"] = torch.full_like(given["input_ids"], 7)
    adapter = gw.graft(model, gw.Laplacian(reduction=4))
    scatter(adapter)
    run(model, given, grad=True).pow(2).mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in adapter.parameters())


def test_p_adapter__a_small_p_prefers_near_neighbours_and_the_self_edge_can_go() -> None:
    nodes = torch.tensor([[[0.0], [0.1], [2.0]]])
    m = torch.full((1, 3, 3), 1 / 3)
    near, far = edges(m, nodes, nodes, 1.25)[0, 0, 1:]
    plain = edges(m, nodes, nodes, 2.0)[0, 0, 1:]
    assert near > 5 * far and plain[0] == plain[1]
    given, outputs = batch("bert"), []
    for edge in ("keep", "zero"):
        model = make("bert")
        scatter(gw.graft(model, gw.Laplacian(reduction=4, self_edge=edge)))
        outputs.append(run(model, given))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    _, f = graph(1)  # published, i = i outweighs everything: F' is F
    torch.testing.assert_close(passed(edges(graph(1)[0], f, f, 1.25), f, f, 0.16), f, atol=1e-3, rtol=1e-3)


def test_p_adapter__counts() -> None:
    config = T.BertConfig(num_hidden_layers=2)
    model = on_meta(lambda: T.BertModel(config))
    adapter = gw.graft(model, "p_adapter", head=False)
    attention, forward = adapter.parts
    assert [attention.method.count(site) for site in attention.sites] == [222_145] * 2
    assert attention.num_parameters == 2 * 222_145 == 2 * (2 * (768 * 96 + 96) + 96 * 768 + 768 + 1)
    assert forward.num_parameters == 2 * (2 * 768 * 96 + 96 + 768)
    assert closed_form(model, adapter.methods) == adapter.num_parameters


def test_p_adapter__the_map_is_read_and_not_changed() -> None:
    given = batch("bert")
    model, plain = make("bert", attn_implementation="eager"), make("bert", attn_implementation="eager")
    adapter = gw.graft(model, gw.Laplacian(reduction=4, layers="0"))
    scatter(adapter)
    maps, own = (m(**given, output_attentions=True).attentions for m in (model, plain))
    assert torch.equal(maps[0], own[0]) and not torch.equal(maps[1], own[1])
    (delta,) = adapter.deltas()
    run(model, given, grad=True).pow(2).mean().backward()
    assert delta.down.grad.any() and delta.theta.grad.any()
    # the gradient of D goes through A' too: the same step with A' held still has another one
    m, nodes = graph()
    free, still = nodes.clone().requires_grad_(), nodes.clone().requires_grad_()
    passed(edges(m, free, free, 1.5), free, free, 0.2).pow(2).sum().backward()
    passed(edges(m, still, still, 1.5).detach(), still, still, 0.2).pow(2).sum().backward()
    assert (free.grad - still.grad).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "vit", "torch"])
def test_p_adapter__probabilities_are_read_before_dropout(name: str) -> None:
    """In training, with nothing trained, the message is that of evaluation although the backbone drops probabilities."""
    seen: list[Tensor] = []
    dropping: dict[str, Any] = {
        "bert": {"attention_probs_dropout_prob": 0.5},
        "vit": {"attention_probs_dropout_prob": 0.5},
    }
    model, given = make(name, **dropping.get(name, {})), batch(name, pad=0)
    if name == "torch":
        model.layers[0].self_attn.dropout = 0.5
    adapter = gw.graft(model, gw.Laplacian(reduction=4, layers="0"), head=False)
    (delta,) = adapter.deltas()
    forward = delta.forward

    def spied(x: Tensor, y: Tensor) -> Tensor:
        seen.append(delta.runtime.state[delta, "passed"])
        return forward(x, y)

    delta.forward = spied
    outputs = [run(model.train(training), given, grad=True) for training in (True, False)]
    assert not torch.allclose(*outputs)  # dropout acts in the backbone
    torch.testing.assert_close(*seen)


def test_p_adapter__beside_a_prefix_and_row_by_row() -> None:
    given, model = batch("bert"), make("bert")
    scatter(gw.graft(model, gw.Laplacian(reduction=4), "p", head=False))
    scatter(gw.graft(model, gw.Laplacian(reduction=4), "other", head=False), seed=8)
    scatter(gw.graft(model, gw.Prefix(2, "flat"), "prefix", head=False))
    outputs = {}
    for text in ("p", "other", "p >> prefix", "prefix >> p", "0.5*p"):
        with gw.using(model, text):
            outputs[text] = run(model, given)
    assert len({out.sum().item() for out in outputs.values()}) == 5
    for pair in (("p", "other"), ("0.5*p", "p"), ("p", "prefix >> p")):
        with gw.using(model, f"rows({', '.join(pair)})"):
            both = run(model, given)
        for row, name in enumerate(pair):
            torch.testing.assert_close(both[row], outputs[name][row], atol=1e-5, rtol=1e-4)


def test_p_adapter__bad_input_is_refused_by_name() -> None:
    for text, words in {
        "laplacian(reduction=5)": "32 // 5 = 6 for 4 heads",
        "laplacian(at='mlp')": "role 'mlp'",
        "laplacian(p=0.5)": "p=0.5",
        "laplacian(graph='tree')": "tree",
    }.items():
        with pytest.raises(gw.GraftError, match=words):
            gw.graft(make("bert"), text)
