"""Pfeiffer et al. 2020: language adapters with invertible ones, and task adapters on top of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert as classifier
from adapter_models import closed_form, gpt2, ids, masked_bert, on_meta, spread, t5
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

import graftwork as gw
from graftwork.methods.input.forms.coupling import Glow, Nice

pytestmark = pytest.mark.system("mad-x")
COUPLINGS = ("nice", "glow")


def coupling(d: int, kind: str, std: float = 0.2):
    """A random bijection of [..., d]."""
    model = masked_bert(d=d)
    adapter = gw.graft(model, gw.Invertible(coupling=kind), head=False)
    spread(adapter, std)
    return next(adapter.deltas()).coupling


def hidden(model, **inputs):
    """(the first block's input, the LM head's input, the logits)"""
    seen = {}
    block, head = next(m for p, m in model.named_modules() if p.endswith(".0")), model.get_output_embeddings()
    hooks = [
        m.register_forward_pre_hook(lambda m, args, kwargs, n=n: seen.__setitem__(n, args[0] if args else kwargs["hidden_states"]),
                                    with_kwargs=True)
        for n, m in (("first", block), ("last", head))
    ]  # fmt: skip
    with torch.no_grad():
        out = model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen["first"], seen["last"], out.logits


def logits(model, text: str | None = "now"):
    with torch.no_grad():
        if text == "now":
            return model(ids()).logits
        with gw.using(model, text):
            return model(ids()).logits


# -- 1. the inverse


@pytest.mark.parametrize("kind", [Nice, Glow])
@pytest.mark.parametrize("d", [8, 32, 9])  # 9: halves of unequal width
def test_mad_x__the_inverse_undoes_the_forward_edit(kind, d):
    torch.manual_seed(0)
    for std, dtype, tolerance in ((0.2, torch.float32, 1e-5), (0.5, torch.float64, 1e-10)):
        f = kind(d, 2, "relu", std, torch.empty(0, dtype=dtype))
        e = torch.randn(4, 5, d, generator=torch.Generator().manual_seed(2), dtype=dtype)
        with torch.no_grad():
            assert (f.inverse(f(e)) - e).abs().max() < tolerance
            assert (f(f.inverse(e)) - e).abs().max() < tolerance
            assert (f(e) - e).abs().max() > 0.1  # it does something


@pytest.mark.parametrize("kind", COUPLINGS)
def test_mad_x__the_coupling_by_hand(kind):
    f = coupling(8, kind)
    e = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))

    def network(n, x):
        return F.relu(x @ n.down.T + n.down_bias) @ n.up.T + n.up_bias

    def half(e, given):
        if kind == "nice":
            return e + given
        s, t = given[:, :4], given[:, 4:]
        return torch.exp(5 * 0.636 * torch.atan(s / 5)) * e + t

    with torch.no_grad():
        o1 = half(e[:, :4], network(f.F, e[:, 4:]))
        o2 = half(e[:, 4:], network(f.G, o1))
        torch.testing.assert_close(f(e), torch.cat([o1, o2], -1))


@pytest.mark.parametrize("kind", COUPLINGS)
def test_mad_x__embeddings_are_edited_and_the_head_sees_the_inverse(kind):
    """An encoder without blocks in between would give its input back: f^-1(f(e)); here the blocks see f(e), the head f^-1(h)."""
    for make, place in ((masked_bert, "bert.embeddings"), (gpt2, "transformer.drop")):
        model = make()
        e, _, base = hidden(model, input_ids=ids())
        adapter = gw.graft(model, gw.Invertible(coupling=kind), head=False)
        spread(adapter)
        (delta,) = adapter.deltas()
        assert [s.path for s in adapter.sites] == [place]
        first, last, out = hidden(model, input_ids=ids())
        with torch.no_grad():
            torch.testing.assert_close(first, delta.coupling(e))
            head = model.get_output_embeddings()
            torch.testing.assert_close(out, F.linear(delta.coupling.inverse(last), head.weight, head.bias))
        assert not torch.allclose(out, base, atol=1e-2)


def test_mad_x__a_task_head_has_no_inverse():
    model = classifier()
    adapter = gw.graft(model, gw.Invertible(), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    assert not delta.overrides("enter") and delta.overrides("forward")
    base = masked_bert()
    (inverted,) = gw.graft(base, gw.Invertible(), head=False).deltas()
    assert inverted.overrides("enter")


def test_mad_x__inverses_run_in_the_opposite_order():
    model = masked_bert()
    for seed, name in enumerate(("a", "b")):
        spread(gw.graft(model, gw.Invertible(), name, head=False), 0.3 + 0.1 * seed)
    a, b = (next(gw.adapters(model)[name].deltas()).coupling for name in ("a", "b"))
    with gw.using(model, None):
        e, *_ = hidden(model, input_ids=ids())
    gw.activate(model, "a >> b")
    first, last, out = hidden(model, input_ids=ids())
    with torch.no_grad():
        torch.testing.assert_close(first, b(a(e)))
        head = model.get_output_embeddings()
        torch.testing.assert_close(out, F.linear(a.inverse(b.inverse(last)), head.weight, head.bias))
        assert not torch.allclose(out, F.linear(b.inverse(a.inverse(last)), head.weight, head.bias), atol=1e-3)


def test_mad_x__an_encoder_decoder_edits_the_encoder():
    model = t5()
    given = {"input_ids": ids(), "decoder_input_ids": ids(seed=5)}
    adapter = gw.graft(model, gw.Invertible(), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    (site,) = adapter.sites
    assert (site.path, site.unembed) == ("encoder.embed_tokens", "lm_head")
    e = model.get_input_embeddings().weight[ids()]
    first, last, out = hidden(model, **given)
    with torch.no_grad():
        torch.testing.assert_close(first, delta.coupling(e))
        torch.testing.assert_close(out, delta.coupling.inverse(last) @ model.lm_head.weight.T)


# -- the systems and their numbers


def test_mad_x__parameter_oracle():
    model = on_meta(lambda: XLMRobertaForMaskedLM(XLMRobertaConfig(hidden_size=768, num_hidden_layers=12)))
    language, task = gw.MADXLanguage(), gw.MADXTask()
    assert closed_form(model, language[:1]) == 7_091_712
    assert closed_form(model, language[1:]) == 296_064
    assert closed_form(model, task) == 894_528
    adapters = [gw.graft(model, m, n, head=False) for m, n in ((language, "lang"), (task, "task"))]
    biases = sum(p.numel() for a in adapters for p in a.parameters() if p.dim() == 1)
    assert [a.num_parameters for a in adapters] == [7_091_712 + 296_064, 894_528]
    assert sum(a.num_parameters for a in adapters) - biases == 8_257_536


def test_mad_x__glow_counts_what_it_trains():
    for d in (8, 12, 20):
        model = masked_bert(d=d)
        for reduction in (2, 3):
            method = gw.Invertible(coupling="glow", reduction=reduction)
            name = f"r{reduction}"
            assert gw.graft(model, method, name, head=False).num_parameters == closed_form(model, [method])


def test_mad_x__language_and_task_adapters_by_hand():
    """LA = U relu(D LN(f + x) + b) + b' + f;  TA = U' relu(D' LN(LA + x) + b) + b' + LA;  the layer gives LN(TA + x)."""
    model = masked_bert(layers=1)
    for name, methods in (("lang", gw.MADXLanguage(coupling="none")), ("task", gw.MADXTask(reduction=4))):
        spread(gw.graft(model, methods, name, head=False))
    layer = model.bert.encoder.layer[0]
    la, ta = (next(gw.adapters(model)[n].deltas()) for n in ("lang", "task"))
    with torch.no_grad():
        with gw.using(model, None):
            x = layer.attention(model.bert.embeddings(ids()))[0]
            f, norm = layer.output.dense(layer.intermediate(x)), layer.output.LayerNorm
            branch = lambda d, h: F.linear(F.relu(F.linear(h, d.down, d.down_bias)), d.up, d.up_bias)  # noqa: E731
            language = branch(la, norm(f + x)) + f
            task = branch(ta, norm(language + x)) + language
            by_hand = model.cls(norm(task + x))
        torch.testing.assert_close(logits(model, "lang >> task"), by_hand, atol=1e-5, rtol=1e-5)


# -- 2. stacks


def languages(model):
    """Two language adapters and a task adapter."""
    for seed, name in enumerate(("en", "de")):
        spread(gw.graft(model, gw.MADXLanguage(), name, head=False), 0.2 + 0.1 * seed)
    return gw.graft(model, gw.MADXTask(reduction=4), "task")


@pytest.mark.parametrize("make", [masked_bert, classifier])
def test_mad_x__the_order_of_a_stack_matters_and_a_language_is_swapped(make):
    model = make()
    task = languages(model)
    spread(task)
    before = {k: v.clone() for k, v in task.state_dict().items()}
    assert not torch.allclose(logits(model, "en >> task"), logits(model, "task >> en"), atol=1e-4)
    english, german = logits(model, "en >> task"), logits(model, "de >> task")
    assert not torch.allclose(english, german, atol=1e-4)
    assert torch.equal(logits(model, "en >> task"), english)
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())


def test_mad_x__a_language_learnt_with_an_lm_head_serves_a_task(tmp_path):
    """Stage 1 has an LM head, stage 2 a classifier: one file for both."""
    learning, working = masked_bert(), classifier()
    state = {k: v for k, v in learning.state_dict().items() if k.startswith("bert.")}
    working.load_state_dict(state, strict=False)
    spread(gw.graft(learning, gw.MADXLanguage(), "en", head=False))
    gw.save(learning, "en", tmp_path / "en")
    loaded = gw.load(working, tmp_path / "en")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), gw.adapters(learning)["en"].parameters(), strict=True)
    )
    inputs = {"input_ids": ids()}
    with torch.no_grad():
        states = [m.bert(**inputs).last_hidden_state for m in (learning, working)]
    torch.testing.assert_close(*states)


# -- 3. stage 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mad_x__stage_two_trains_the_task_adapter_and_the_head(checkpointing):
    model = classifier()
    task = languages(model)
    frozen = {n: {k: v.clone() for k, v in gw.adapters(model)[n].state_dict().items()} for n in ("en", "de")}
    gw.adapters(model)["en"].trainable = False
    gw.activate(model, "en >> task")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = {id(p) for p in task.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids(), labels=torch.tensor([0, 1])).loss.backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == trained
    optimiser.step()
    for name, tensors in frozen.items():
        assert all(torch.equal(v, tensors[k]) for k, v in gw.adapters(model)[name].state_dict().items())


def test_mad_x__checkpointing_and_a_list_of_methods_give_the_same_gradients():
    """The bijection beside bottlenecks in one adapter, trained by masked language modelling."""
    results = []
    for checkpointing in (False, True):
        model = masked_bert()
        adapter = gw.graft(model, [gw.Bottleneck(d=4, at="mlp"), gw.Invertible(), gw.LoRA(r=2)], head=False)
        spread(adapter)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(ids(), labels=ids()).loss.backward()
        results.append([p.grad for p in adapter.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


# -- 4. the determinant


def test_mad_x__nice_preserves_volume_and_glow_does_not():
    e = torch.randn(8, generator=torch.Generator().manual_seed(1))
    sizes = {}
    for kind in COUPLINGS:
        f = coupling(8, kind)
        jacobian = torch.autograd.functional.jacobian(lambda e, f=f: f(e[None])[0], e)
        sizes[kind] = torch.linalg.det(jacobian).item()
        assert not torch.allclose(jacobian, torch.eye(8), atol=0.1)
    assert abs(sizes["nice"] - 1) < 1e-5
    assert abs(sizes["glow"] - 1) > 0.01
