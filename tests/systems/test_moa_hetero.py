"""Cao et al. 2025: experts of different kinds in one block, weighted token by token without competing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, closed_form, gpt2, ids, llama, llama_of, spread, t5, vit

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("moa-hetero")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
EXPERTS = (
    *(gw.LoRA(r=8, alpha=8.0, at=role) for role in ROLES),
    gw.LlamaAdapter(length=10, squash="none", at="self.attn"),
    gw.Bottleneck(d=16, act="silu", position="parallel", at="mlp"),
)
SMALL = (gw.LoRA(r=2, at="q, v"), gw.Bottleneck(d=4, position="parallel", at="mlp"))


def logits(model, x=None):
    with torch.no_grad():
        return model(ids() if x is None else x).logits


def grafted(model, **options):
    """A MoA away from its initial values."""
    adapter = gw.graft(model, gw.MoA(**options), "moa", head=False)
    spread(adapter)
    return adapter


def routers(adapter):
    """The deltas at the blocks."""
    return [adapter.parts[0].deltas[s.key] for s in adapter.sites if s.role == "block"]


def fixed(adapter, w: float, expert=slice(None)) -> None:
    """w_e of every token: 0 or 1."""
    for router in routers(adapter):
        router.weight.data[expert] = 0.0
        router.bias.data[expert] = 1000.0 if w else -1000.0


def test_moa_hetero__the_default_is_the_papers():
    method = gw.system("moa-hetero")
    assert method == gw.MoA(of=EXPERTS) and len(method.of) == 9
    assert gw.parse_methods(str(gw.MoA(of=SMALL))) == (gw.MoA(of=SMALL),)
    model = llama()
    base = logits(model)
    adapter = gw.graft(model, method, head=False)
    assert torch.equal(logits(model), base)
    for router in routers(adapter):
        assert router.weight.std() > 0.05 and not router.bias.any()


# -- 1. w forced to 1, and to 0


def test_moa_hetero__all_weights_one_is_all_experts_together():
    model, plain = llama(), llama()
    adapter = grafted(model)
    together = gw.graft(plain, list(EXPERTS), head=False)
    spread(together)
    fixed(adapter, 1)
    own = {s.key: adapter.parts[0].deltas[s.key] for s in adapter.sites if s.role != "block"}
    for part in together.parts:
        for key, delta in part.deltas.items():
            own.pop(key).delta.load_state_dict(delta.state_dict())
    assert not own
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)
    assert (logits(model) - logits(llama())).abs().max() > 1e-2


@pytest.mark.parametrize("sparse", [False, True])
def test_moa_hetero__all_weights_zero_is_the_backbone(sparse):
    model = llama()
    base = logits(model)
    fixed(grafted(model, sparse=sparse), 0)
    assert torch.equal(logits(model), base)


def test_moa_hetero__a_block_by_hand():
    """One expert at v and one beside the feed-forward layer, with the router's own weights."""
    model = llama(layers=1)
    adapter = grafted(model, of=[gw.LoRA(r=2, alpha=6.0, at="v"), SMALL[1]])
    block, seen = model.model.layers[0], {}
    for name, module in {"block": block, "v": block.self_attn.v_proj, "mlp": block.mlp}.items():
        module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    logits(model)
    x = seen["block"][0]
    (router,) = routers(adapter)
    w = torch.sigmoid(x @ router.weight.T + router.bias)
    lora, beside = (adapter.parts[0].deltas[s.key].delta for s in adapter.sites if s.role in ("v", "mlp"))
    u, v = seen["v"]
    plain = F.linear(u, block.self_attn.v_proj._parameters["weight"])
    torch.testing.assert_close(v, plain + w[..., 0, None] * 3.0 * u @ lora.down.T @ lora.up.T, atol=1e-5, rtol=1e-4)
    h, y = seen["mlp"]
    with torch.no_grad(), gw.using(model, None):
        base = block.mlp(h)
    added = F.gelu(h @ beside.down.T + beside.down_bias) @ beside.up.T + beside.up_bias
    torch.testing.assert_close(y, base + w[..., 1, None] * added, atol=1e-5, rtol=1e-4)


def test_moa_hetero__the_swiglu_router_is_its_equation():
    adapter = grafted(llama(), of=SMALL, router="swiglu")
    router = routers(adapter)[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    assert router.gate.shape == router.up.shape == (8, 32) and router.weight.shape == (2, 8)
    inner = F.silu(x @ router.gate.T + router.gate_bias) * (x @ router.up.T + router.up_bias)
    torch.testing.assert_close(router.shares(x), torch.sigmoid(inner @ router.weight.T + router.bias))


# -- 2. the sparse variant


def test_moa_hetero__thresholds_at_the_ends():
    soft = llama()
    spread(gw.graft(soft, gw.MoA(), head=False))
    base = logits(llama())
    for tau, expected in ((0.0, logits(soft)), (1.0, base)):
        model = llama()
        spread(gw.graft(model, gw.MoA(sparse=True, threshold="constant", max_threshold=tau), head=False))
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-5)
    assert (logits(soft) - base).abs().max() > 1e-2


@pytest.mark.parametrize("shifted", [False, True])
def test_moa_hetero__gathering_the_kept_tokens_is_masking(shifted, monkeypatch):
    model = llama()
    adapter = grafted(model, sparse=True, max_threshold=1.0, shifted=shifted)
    x = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0))
    router = routers(adapter)[0]
    w, tau = (
        torch.sigmoid(F.linear(x, a, b)) for a, b in ((router.weight, router.bias), (router.tau, router.tau_bias))
    )
    kept = w >= tau
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(router.shares(x), torch.where(kept, w - tau if shifted else w, 0.0))
    gathered = logits(model)
    monkeypatch.setattr(
        torch.compiler, "is_compiling", lambda: True
    )  # as where the number of kept tokens may not be known
    torch.testing.assert_close(logits(model), gathered, atol=1e-5, rtol=1e-5)


def test_moa_hetero__only_kept_tokens_reach_an_expert():
    model = llama(layers=1)
    adapter = grafted(model, of=SMALL, sparse=True, max_threshold=1.0)
    rows = []
    routers(adapter)[0].weight.data *= 30  # the states of the first layer are small
    delta = next(adapter.parts[0].deltas[s.key].delta for s in adapter.sites if s.role == "mlp")
    delta.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    logits(model)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits(model)
    kept = int((routers(adapter)[0].shares(seen[0])[..., 1] > 0).sum())
    assert rows == [kept, kept] and 0 < kept < ids().numel()


@pytest.mark.parametrize("shifted", [False, True])
def test_moa_hetero__the_threshold_learns_where_it_is_subtracted(shifted):
    model = llama()
    adapter = grafted(model, of=SMALL, sparse=True, shifted=shifted)
    model.train()(ids(), labels=ids()).loss.backward()
    for router in routers(adapter):
        assert router.weight.grad.any()
        assert (router.tau.grad is not None and bool(router.tau.grad.any())) == shifted


# -- 3. experts do not compete


def test_moa_hetero__weights_are_independent():
    adapter = grafted(llama())
    router = routers(adapter)[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    before = router.shares(x)
    router.bias.data[3] += 2.0
    after = router.shares(x)
    others = [e for e in range(9) if e != 3]
    assert torch.equal(after[..., others], before[..., others]) and (after[..., 3] > before[..., 3]).all()
    assert not torch.allclose(before.sum(-1), torch.ones(2, 5), atol=0.1)


# -- 4. one more expert


def test_moa_hetero__one_more_expert_widens_the_router_alone():
    model = llama()
    old = grafted(model, of=SMALL)
    new = gw.add_expert(model, "more", "moa", gw.LlamaAdapter(length=3, squash="none", at="self.attn"))
    assert gw.active(model) == "more" and len(new.methods[0].of) == 3
    before, after = old.state_dict(), new.state_dict()
    for key, value in before.items():
        if key.endswith(("block/weight", "block/bias")):
            assert after[key].shape[0] == 3 and torch.equal(after[key][:2], value)
            assert after[key].shape[1:] == value.shape[1:]
        else:
            assert torch.equal(after[key], value)
    assert all("self_attn:attn" in key for key in after.keys() - before.keys())
    with_both = logits(model)
    gw.activate(model, "moa")
    torch.testing.assert_close(logits(model), with_both)  # the new expert starts at nothing
    with pytest.raises(GraftError, match="both sit there"):
        gw.add_expert(model, "again", "moa", gw.LoRA(r=2, at="v"))
    with pytest.raises(GraftError, match="has no experts"):
        gw.graft(model, gw.LoRA(r=2), "plain", head=False)
        gw.add_expert(model, "again", "plain", gw.LoRA(r=2, at="o"))


# -- parameters, backbones, files, refusals


@pytest.mark.parametrize(("router", "sparse"), [("linear", False), ("linear", True), ("swiglu", False)])
def test_moa_hetero__parameters_of_llama_8b(router, sparse):
    d, ff, layers, e = 4096, 14336, 32, 9
    model = llama_of(d, layers, 32, ff)
    method = gw.MoA(router=router, sparse=sparse)
    experts = 4 * 8 * 2 * d + 3 * 8 * (d + ff) + 10 * d + 32 + 2 * 16 * d + 16 + d
    routing = d * e + e if router == "linear" else 2 * (d * 4 * e + 4 * e) + 4 * e * e + e
    expected = layers * (experts + routing + (d + 1 if sparse else 0))
    assert closed_form(model, [method]) == expected
    assert gw.graft(model, method, head=False).num_parameters == expected


@pytest.mark.parametrize("make", [bert, gpt2, t5, vit])
def test_moa_hetero__other_backbones(make, tmp_path):
    prompt = (
        gw.LlamaAdapter(length=3, squash="none", at="self.attn") if make is not gpt2 else gw.Prefix(length=3, at="attn")
    )
    of = [gw.LoRA(r=2, at="q"), gw.IA3(at="up"), prompt, SMALL[1]]
    outputs = []
    for state in ("base", "moa", "again"):
        model = make()
        if state == "moa":
            grafted(model, of=of)
            gw.save(model, "moa", tmp_path / "moa")
        if state == "again":
            assert gw.load(model, tmp_path / "moa").methods[0].of[2] == prompt
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) if make is vit else ids()
        with torch.no_grad():
            outputs.append(model(x, decoder_input_ids=ids()).logits if make is t5 else model(x).logits)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert torch.equal(outputs[1], outputs[2])


def test_moa_hetero__two_of_them_stand_in_a_stack():
    """Each has routers of its own."""
    model = llama()
    for name, std in (("a", 0.2), ("b", 0.3)):
        spread(gw.graft(model, gw.MoA(of=SMALL), name, head=False), std)
    with gw.using(model, "b"):
        alone = logits(model)
    fixed(gw.adapters(model)["a"], 0)
    with gw.using(model, "a >> b"):
        torch.testing.assert_close(logits(model), alone, atol=1e-5, rtol=1e-5)


def test_moa_hetero__rows_are_refused_by_name():
    model = llama()
    for name in "ab":
        gw.graft(model, gw.MoA(of=SMALL), name, head=False)
    with pytest.raises(GraftError, match="changes the whole pass"):
        gw.activate(model, gw.rows(["a", "b"]))
    assert gw.active(model) == "b"


def test_moa_hetero__refusals():
    model = llama()
    with pytest.raises(GraftError, match="merge"):
        gw.graft(model, gw.MoA(of=SMALL), "m", head=False)
        gw.merge(model)
    gw.remove(model, "m")
    for of, reason in (
        ([gw.LoRA(r=2, at="q"), gw.LoRA(r=3, at="q")], "both sit there"),
        ([gw.Bottleneck(d=2, position="before", at="mlp")], "more than edit an output"),
        ([gw.Laplacian(at="self.attn")], "more than edit an output"),  # it looks at the attention and edits the output
        ([gw.LoRA(r=2, at="embed")], "in no block"),
        ([gw.LoRA(r=2, at="nope")], "nope"),
    ):
        with pytest.raises(GraftError, match=reason):
            gw.graft(model, gw.MoA(of=of), head=False)
        assert not gw.adapters(model)
    for of, reason in (
        ([], "a list of methods"), (["lora"], "a list of methods"), ([gw.LoRA()], "the expert"), ([gw.AdaLoRA(at="q")], "needs step"),
    ):  # fmt: skip
        with pytest.raises(GraftError, match=reason):
            gw.MoA(of=of)
    with pytest.raises(GraftError, match="another tower"):
        gw.graft(t5(), gw.MoA(of=SMALL), head=False)
    with pytest.raises(GraftError, match="gate"):  # the published experts want a gate
        gw.graft(bert(), gw.MoA(), head=False)
