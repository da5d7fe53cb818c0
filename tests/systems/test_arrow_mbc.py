"""Ostapenko et al. 2024: prototypes of LoRAs, every token routed by them, and clusters of LoRAs."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids, llama
from routing_models import states
from torch import Tensor
from value_models import by_formula, change, keys, randomly, relative

import graftwork as gw
from graftwork.core.errors import GraftError

arrow = pytest.mark.system("arrow-mbc")


@arrow
def test_arrow_mbc__a_prototype_is_the_top_right_singular_vector():
    model = bert()
    randomly(model, gw.LoRA(r=4, alpha=3.0, at="q, up, down"), "a", 1)
    found = gw.prototypes(model, "a")
    assert found.keys() == set(keys(model, "a"))
    for key, p in found.items():
        v = torch.linalg.svd(by_formula(model, "a", key)).Vh[0]
        assert float((p @ v).abs()) == pytest.approx(1, abs=1e-6)
        assert float(p.norm()) == pytest.approx(1)
        assert float(p[p.abs().argmax()]) > 0
    # whatever the factors, and the scale
    m = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    for delta in gw.adapters(model)["a"].deltas():
        delta.down.data, delta.up.data = m @ delta.down.data, 2 * delta.up.data @ m.inverse()
    for key, p in gw.prototypes(model, "a").items():
        torch.testing.assert_close(p, found[key], atol=1e-4, rtol=1e-4)


@arrow
def test_arrow_mbc__uniform_mu_can_be_merged():
    """What routing becomes for top_k = E and an infinite temperature."""
    model = bert()
    for seed, name in enumerate("abc", 1):
        randomly(model, gw.LoRA(r=seed, alpha=3.0), name, seed)
    gw.combine(model, "mu", dict.fromkeys("abc", 1 / 3))
    for key in keys(model, "a"):
        wanted = sum(by_formula(model, n, key) for n in "abc") / 3
        assert relative(change(model, "mu", key), wanted) < 1e-5


@arrow
@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_arrow_mbc__planted_groups_are_recovered(quantile):
    model = bert()
    g = torch.Generator().manual_seed(0)
    centres, planted = [], {0: [], 1: []}
    for i in range(10):
        adapter = gw.graft(model, gw.LoRA(r=3), f"task{i}", head=False)
        group = i % 2
        planted[group].append(adapter.name)
        if i < 2:
            centres.append([torch.randn(p.shape, generator=g) for p in adapter.parameters()])
        for p, centre in zip(adapter.parameters(), centres[group], strict=True):
            p.data = centre + 0.5 * torch.randn(p.shape, generator=g)
    names = [f"task{i}" for i in range(10)]
    found = gw.clusters(model, names, k=2, quantile=quantile)
    assert sorted(map(sorted, found)) == sorted(planted.values())
    assert gw.clusters(model, names, k=2, quantile=quantile) == found
    with pytest.raises(GraftError, match="at least k names"):
        gw.clusters(model, names[:2], k=3)
    randomly(model, gw.LoRA(r=4), "other", 1)
    with pytest.raises(GraftError, match="is lora"):
        gw.clusters(model, [*names, "other"], k=2)


QUERY = "bert.encoder.layer.0.attention.self.query"


def library(model, names="abc", at="q, v", r=4):
    for seed, name in enumerate(names, 1):
        randomly(model, gw.LoRA(r=r, alpha=3.0 * seed, at=at), name, seed)
    return model


def seen(model, expression, path=QUERY) -> tuple[Tensor, Tensor]:
    """Input and output of one module in a pass, in float64."""
    out: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(path)
    hook = module.register_forward_hook(lambda m, args, y: out.append((args[0].double(), y.double())))
    states(model, expression)
    hook.remove()
    return out[0]


def routed(changes, x: Tensor, k: int, t: float) -> Tensor:
    """sum_e w_e dW_e x from dense changes: the top right singular vectors, the k largest |p.x|, their softmax, and the sum."""
    p = torch.stack([torch.linalg.svd(dw).Vh[0] for dw in changes])
    length = (x @ p.mT).abs()
    low = length.sort(-1, descending=True).values[..., k - 1 : k]
    w = torch.softmax((length / t).masked_fill(length < low, -torch.inf), -1)
    return sum(w[..., e, None] * (x @ dw.mT) for e, dw in enumerate(changes))


def plain(model, x: Tensor, path=QUERY) -> Tensor:
    module = model.get_submodule(path)
    bias = 0 if module.bias is None else module.bias.detach().double()
    return x @ module.weight.detach().double().mT + bias


@arrow
@pytest.mark.parametrize(("k", "t"), [(1, 1.0), (2, 1.0), (2, 0.3), (3, 2.0), (8, 1.0), (3, 0.0)])
def test_arrow_mbc__routes_each_token_by_the_dense_formula(k, t):
    model = library(bert())
    x, y = seen(model, f"route(a, b, c, by='arrow(top_k={k}, temperature={t})')".replace("'", '"'))
    changes = [by_formula(model, n, f"{QUERY}:q") for n in "abc"]
    wanted = plain(model, x) + routed(changes, x, min(k, 3), t or 32**0.5)
    torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)


@arrow
def test_arrow_mbc__signs_and_factors_do_not_matter(monkeypatch):
    model, by = library(bert()), 'route(a, b, c, by="arrow(top_k=2)")'
    before = states(model, by)
    m = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    for i, name in enumerate("abc"):
        for delta in gw.adapters(model)[name].deltas():
            sign = -1 if i == 1 else 1  # A and B both negated: the update stays
            delta.down.data, delta.up.data = sign * m @ delta.down.data, sign * delta.up.data @ m.inverse()
    torch.testing.assert_close(states(model, by), before, atol=1e-4, rtol=1e-4)
    flipped = gw.methods.routing.arrow.ArrowMixer._prototypes
    monkeypatch.setattr(
        gw.methods.routing.arrow.ArrowMixer,
        "_prototypes",
        lambda self, of: flipped(self, of) * torch.tensor([[1.0], [-1.0], [-1.0]]),
    )
    for delta in gw.adapters(model)["a"].deltas():
        delta.down.data = delta.down.data.clone()  # the prototypes are made again
    torch.testing.assert_close(states(model, by), before, atol=1e-4, rtol=1e-4)


@arrow
def test_arrow_mbc__uniform_in_the_limit_one_expert_and_orthogonal_experts():
    model = library(bert())
    gw.combine(model, "mu", dict.fromkeys("abc", 1 / 3))
    limit = states(model, 'route(a, b, c, by="arrow(top_k=3, temperature=1e9)")')
    torch.testing.assert_close(limit, states(model, "mu"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(limit, states(model, 'route(a, b, c, by="uniform")'), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states(model, "route(a, by=arrow)"), states(model, "a"), atol=1e-6, rtol=1e-6)
    # two orthogonal updates, tokens in the direction of the first: nothing of the second
    model = library(bert(), "ab", at=f"/{QUERY}$/".replace(".", r"\."), r=1)
    x, _ = seen(model, None)
    token = x[0, 3] / x[0, 3].norm()
    other = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other -= (other @ token) * token
    for name, direction in (("a", token), ("b", other)):
        for delta in gw.adapters(model)[name].deltas():
            delta.down.data = direction.float()[None]
    with torch.no_grad(), gw.using(model, 'route(a, b, by="arrow(top_k=1)")'):
        chosen = seen(model, 'route(a, b, by="arrow(top_k=1)")')[1][0, 3]
    torch.testing.assert_close(chosen, seen(model, "a")[1][0, 3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(chosen, seen(model, None)[1][0, 3], atol=1e-3)


@arrow
def test_arrow_mbc__factors_mixed_before_are_the_updates_mixed_after_for_one_expert_alone():
    model = library(bert())
    by = "route(a, b, c, by=\"arrow(top_k={}, combine='{}')\")"
    torch.testing.assert_close(
        states(model, by.format(1, "before")), states(model, by.format(1, "after")), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(states(model, by.format(2, "before")), states(model, by.format(2, "after")), atol=1e-3)
    # (sum w B) (sum w A) x of one module
    x, y = seen(model, by.format(2, "before"))
    deltas = [gw.adapters(model)[n].parts[0].deltas[f"{QUERY}:q"] for n in "abc"]
    p = torch.stack([torch.linalg.svd(by_formula(model, n, f"{QUERY}:q")).Vh[0] for n in "abc"])
    length = (x @ p.mT).abs()
    low = length.sort(-1, descending=True).values[..., 1:2]
    w = torch.softmax(length.masked_fill(length < low, -torch.inf), -1)
    down = torch.einsum("bte,eri->btri", w, torch.stack([d.down.detach().double() for d in deltas]))
    up = torch.einsum("bte,eor->btor", w, torch.stack([d.scale * d.up.detach().double() for d in deltas]))
    wanted = plain(model, x) + (up @ (down @ x[..., None]))[..., 0]
    torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)
    randomly(model, gw.LoRA(r=2), "d", 9)
    with pytest.raises(GraftError, match="ranks"):
        gw.activate(model, "route(a, d, by=\"arrow(combine='before')\")")


@arrow
def test_arrow_mbc__general_knowledge_is_subtracted():
    """GenKnowSub, exact: dW_e - mean_g dW_g, routed by what is left of each."""
    model = library(bert(), "abgh")
    exact = {n: gw.A(n) - gw.mean("g", "h") for n in "ab"}
    x, y = seen(model, gw.route(exact["a"], exact["b"], by=gw.Arrow(top_k=1)))
    general = sum(by_formula(model, n, f"{QUERY}:q") for n in "gh") / 2
    changes = [by_formula(model, n, f"{QUERY}:q") - general for n in "ab"]
    torch.testing.assert_close(y, plain(model, x) + routed(changes, x, 1, 1.0), atol=1e-4, rtol=1e-4)


def saved_library(tmp_path):
    """LoRAs whose strongest direction stands out (PEFT finds it by 15 rounds of power iteration), as PEFT's folders."""
    model = llama()
    for seed, name in enumerate("abcgh", 1):
        adapter = randomly(model, gw.LoRA(r=4, alpha=6.0, at="q, v"), name, seed)
        for delta in adapter.deltas():
            delta.up.data[:, 0] *= 8
        gw.save(model, name, tmp_path / name, format="peft")
    return model


@arrow
@pytest.mark.parametrize("general", [False, True])
def test_arrow_mbc__is_what_peft_computes(tmp_path, general):
    from peft import ArrowConfig, create_arrow_model

    model = saved_library(tmp_path)
    config = ArrowConfig(top_k=2, router_temperature=0.7, use_gks=general, rng_seed=0)
    folders = [str(tmp_path / n) for n in "abcgh"]
    peer = create_arrow_model(
        llama(), folders[:3], config, general_adapter_paths=folders[3:] if general else None
    ).eval()
    with torch.no_grad():
        theirs = peer(ids(), output_hidden_states=True).hidden_states[-1]
    names = list("abc")
    if general:
        # in the space of the factors, A_e - mean_g A_g and B_e - mean_g B_g, with all their cross terms
        of = [
            [[p.detach().clone() for p in gw.adapters(model)[n].parameters()] for n in group] for group in ("abc", "gh")
        ]
        means = [sum(tensors) / 2 for tensors in zip(*of[1], strict=True)]
        for name, tensors in zip(names, of[0], strict=True):
            for p, own, mean in zip(gw.adapters(model)[name].parameters(), tensors, means, strict=True):
                p.data = own - mean
    ours = states(model, gw.route(*names, by=gw.Arrow(top_k=2, temperature=0.7)))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, states(model, gw.route(*names, by=gw.Arrow(top_k=2, temperature=7.0))), atol=1e-3)
