"""fuse, route and split: closed forms, what they are made of, fast paths, and refusals. Adapters of mixed methods stand on one model."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conformance.cases import close, leave_init
from conformance.hosts import BY_NAME, forward, fresh, output
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from test_graft import assert_same, state
from test_sums import CROWDS, SITE, OneSite, one_site, run, several
from torch import Tensor, nn

import graftwork as gw
from graftwork.core.plan import Plan
from graftwork.expressions.algebra import Expr
from graftwork.expressions.mixed import MixedWeight

OUTER = [
    ("outputs", ["m0", "m1", "m2"]),
    ("low rank", ["m0", "m1", "m2"]),
    ("weights", ["m0", "m2", "m3"]),
    ("fast", ["m0", "m1", "m2"]),
]


def names_that_mix(host: str) -> list[str]:
    """Of the crowd: all but those that edit an input and an output by one value, and those below or beside tokens."""
    return [n for n in CROWDS[host][1] if n != "residual 1"]


# --- closed forms at one site, with nothing but linear maps behind it --------------------------------------------------


@pytest.mark.parametrize(("group", "names"), OUTER, ids=[g for g, _ in OUTER])
@pytest.mark.parametrize("learning", [False, True])
def test_a_mixture_changes_the_output_by_the_weighted_changes(group: str, names: list[str], learning: bool) -> None:
    model, _, inputs = one_site(group)

    def out(e: Any) -> Tensor:
        with gw.using(model, e):
            return forward(model, inputs) if learning else output(model, inputs)

    own, alone = out(None), torch.stack([out(n) for n in names])
    close(out(f"route({', '.join(names)}, by=uniform)"), alone.mean(0))
    close(out(f"mean({', '.join(names)})"), alone.mean(0))
    close(out(f"route({names[0]}, by=uniform)"), alone[0])
    close(
        out(f"0.5*route({', '.join(names)}, by=uniform) - {names[0]}"),
        own + 0.5 * (alone.mean(0) - own) - (alone[0] - own),
    )
    weighted = gw.graft(model, gw.Weighted(of=names), "w", head=False)
    close(out("w"), alone.mean(0))
    logits = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        next(weighted.parameters()).copy_(logits)
    w = torch.softmax(logits, 0)
    close(out("w"), torch.einsum("n,n...->...", w, alone))
    part = torch.softmax(logits[[2, 0]], 0)  # the others are out: the softmax is over those that are there
    close(out(f"route({names[2]}, {names[0]}, by=w)"), part[0] * alone[2] + part[1] * alone[0])
    a, b = names[:2]
    ranges = out(f"split({a}=2, {b}=3)")
    close(ranges, torch.cat([alone[0][:, :2], alone[1][:, 2:5], own[:, 5:]], 1))
    close(out(f"split({a}=-1)"), alone[0])
    if group == "low rank":  # behind others of low rank, and in front
        pair = out(f"{a} >> {names[2]}")
        got = out(f"split({a}=2, {b}=-1) >> {names[2]}"), out(f"{names[2]} >> split({a}=2, {b}=-1)")
        want = torch.cat([pair[:, :2], out(f"{b} >> {names[2]}")[:, 2:]], 1)
        close(got[0], want)
        close(got[1], want)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize(("group", "names"), OUTER, ids=[g for g, _ in OUTER])
def test_fusion_by_its_equation(group: str, names: list[str], value: bool, residual: bool) -> None:
    model, _, inputs = one_site(group)
    fusion = gw.graft(model, gw.Fusion(of=names, value=value, residual=residual), "f", head=False, seed=1)
    leave_init(fusion, 4)
    t = {k.rpartition("/")[2]: v for k, v in fusion.state_dict().items()}
    with torch.no_grad():
        h = model.first(inputs["x"])  # type: ignore[operator]
    site: Any = model.site
    seen: dict[str, Tensor] = {}
    for n in (None, *names):
        with gw.using(model, n), torch.no_grad():
            seen[str(n)] = site(h) if n is None else _site_output(model, inputs)
    y, z = seen["None"], torch.stack([seen[n] for n in names], -2)
    u = z if residual else z - y[..., None, :]
    read = y if group == "outputs" else h  # m0, m1 read y, m2 reads h
    q = read @ t["query"].T + t["query_bias"]
    s = torch.softmax((q[..., None, :] * (u @ t["key_weight"].T + t["key_bias"])).sum(-1), -1)
    o = (s[..., None] * (u @ t["value"].T if value else u)).sum(-2)
    want = o if residual else y + o
    with gw.using(model, "f"):
        close(_site_output(model, inputs), want)
    assert s.std(1).max() > 1e-3  # tokens of one row differ in their weights
    order = [names[2], names[0], names[1]]
    close(run(model, f"fuse({', '.join(order)})", inputs), run(model, "f", inputs))


def _site_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the one site gives: its `last` is linear."""
    kept: list[Tensor] = []
    last: Any = model.last
    handle = last.register_forward_hook(lambda m, x, y: kept.append(x[0].detach()))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return kept[0]


def test_weights_of_low_rank_updates_are_two_products() -> None:
    model, (*names, _), inputs = one_site("low rank")
    gw.activate(model, f"route({', '.join(names)}, by=arrow)")
    assert len(model.site._armed.plan.rowwise) == 1  # type: ignore[union-attr]
    with patch.object(Plan, "adapted", side_effect=AssertionError("a dense weight was made")):
        thin = output(model, inputs)
    [mixed] = model.site._armed.plan.weights["weight"]  # type: ignore[union-attr]
    assert isinstance(mixed, MixedWeight) and mixed.thin
    mixed.thin = False
    close(output(model, inputs), thin)
    assert not torch.allclose(thin, run(model, f"mean({', '.join(names)})", inputs), atol=1e-5)


@pytest.mark.parametrize(
    "host", ["conv2d", "conv2d_reflect", "conv1d", "embedding", "packed_qkv", "gpt2", "t5", "linear_wide"]
)
def test_every_kind_of_host(host: str) -> None:
    kind = BY_NAME[host]
    model, inputs = fresh(kind), kind.inputs()
    made = {"at": kind.at} if kind.at else {}
    for name, method in {"a": gw.LoRA(r=3, **made), "b": gw.DoRA(r=2, **made), "c": gw.LoRA(r=2, **made)}.items():
        leave_init(gw.graft(model, method, name, head=False, seed=ord(name)), ord(name))
    for name in "abc":
        close(run(model, f"route({name}, by=uniform)", inputs), run(model, name, inputs))
    leave_init(gw.graft(model, gw.Fusion(of=["a", "b", "c"]), "f", head=False), 7)
    fused = run(model, "f", inputs)
    assert not any(torch.allclose(fused, run(model, n, inputs), atol=1e-5) for n in (None, "a", "b", "c"))
    close(run(model, "0.5*f + 0.5*fuse(a, b, c)", inputs), fused)
    close(run(model, "fuse(c, a, b)", inputs), fused)
    kept = [k for k, v in inputs.items() if v.dim() and v.shape[0] == fused.shape[0]]
    if len(kept) == len(inputs) and host != "t5":
        got = run(model, gw.rows(["f", None, "route(a, c, by=uniform)"]), inputs)
        for i, e in enumerate(["f", None, "route(a, c, by=uniform)"]):
            close(got[i : i + 1], run(model, e, {k: v[i : i + 1] for k, v in inputs.items()}))


def test_attention_is_mixed_too() -> None:
    model, inputs = fresh(BY_NAME["multihead_whole"]), BY_NAME["multihead_whole"].inputs()
    for name, method in {"a": gw.Prefix(length=3, at="attn"), "b": gw.Prefix(length=2, at="attn")}.items():
        leave_init(gw.graft(model, method, name, head=False, seed=ord(name)), ord(name))
    own, a, b = (run(model, e, inputs) for e in (None, "a", "b"))
    close(run(model, "route(a, b, by=uniform)", inputs), (a + b) / 2)
    k = inputs[next(iter(inputs))].shape[1] // 2
    got = run(model, gw.split(a=k), inputs)
    close(got, torch.cat([a[:, :k], own[:, k:]], 1))


# --- laws on whole models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", CROWDS)
@given(data=st.data())
@limits(max_examples=15, deadline=None)
def test_the_laws(host: str, data: st.DataObject) -> None:
    model, inputs = CROWDS[host][0], BY_NAME[host].inputs()
    chosen = data.draw(st.lists(st.sampled_from(names_that_mix(host)), min_size=3, max_size=3, unique=True))
    a, b, c = map(gw.A, chosen)
    try:
        mixed = run(model, gw.route(a, b, c, by="uniform"), inputs)
    except gw.GraftError as error:
        assert "at different sites" in str(error) or "that belong together" in str(error)
        return
    close(run(model, gw.route(c, a, b, by="uniform"), inputs), mixed)
    close(run(model, gw.route(a, by="uniform"), inputs), run(model, a, inputs))
    if all(s.layer is not None for n in (a.name, b.name) for s in gw.adapters(model)[n].sites):
        close(run(model, gw.route(a, gw.drop(b, "0-1"), by="uniform"), inputs), run(model, a, inputs))
        close(run(model, gw.drop(gw.route(a, b, by="uniform"), "0-1"), inputs), run(model, None, inputs))
    try:
        got = run(model, gw.rows([gw.route(a, b, c, by="uniform"), None, a]), inputs)
    except gw.GraftError as error:
        assert "read different inputs" in str(error)
        return
    close(got[:1], mixed[:1])
    close(got[1:2], run(model, None, inputs)[1:2])
    with gw.using(model, gw.route(a, b, c, by="uniform") | b), torch.no_grad():
        first, _ = model(**inputs).values()
    close((first if isinstance(first, Tensor) else first[0]), mixed)


@pytest.mark.parametrize("host", CROWDS)
@given(data=st.data())
@limits(max_examples=10, deadline=None)
def test_a_fusion_of_any_methods(host: str, data: st.DataObject) -> None:
    model, inputs = CROWDS[host][0], BY_NAME[host].inputs()
    a, b = data.draw(st.lists(st.sampled_from(names_that_mix(host)), min_size=2, max_size=2, unique=True))
    before, text = state(model), gw.active(model)
    of = [str(gw.A(a)), str(gw.A(b))]
    try:
        fusion = gw.graft(model, gw.Fusion(of=of, reg=0.5), "f", head=False, seed=0)
    except gw.GraftError as error:
        assert "at different sites" in str(error) or "that belong together" in str(error)
        assert_same(model, before)
        return
    try:
        assert not any(p.requires_grad for n in (a, b) for p in gw.adapters(model)[n].parameters())
        assert fusion.num_parameters == sum(3 * s.d**2 + 2 * s.d for s in fusion.sites)
        out = forward(model, inputs)
        (out.float().pow(2).sum() + gw.auxiliary_loss(model)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in fusion.parameters())
        close(run(model, gw.fuse(gw.A(b), gw.A(a)), inputs), output(model, inputs))
        one = run(model, gw.fuse(a_ := gw.A(a), by="f"), inputs)
        with torch.no_grad():
            for delta in fusion.deltas():
                delta.value.copy_(torch.eye(len(delta.value)))  # type: ignore[union-attr, arg-type]
        close(run(model, gw.fuse(a_, by="f"), inputs), run(model, a_, inputs))
        assert one.shape == out.shape
    finally:
        gw.remove(model, "f")
        gw.activate(model, text)
    assert_same(model, before)


# --- in a pass -----------------------------------------------------------------------------------------------------------

MIXTURES = [
    "f", 'route(a, b, by="arrow(top_k=1)")', "split(a=3, e=-1)", "0.5*fuse(a, e) - 0.2*b", "route(a, e, by=uniform) >> b",
    'fuse(drop(a, layers="0"), e)', "split(f=2, g=-1)",
]  # fmt: skip


def mixtures() -> nn.Module:
    model = several()
    leave_init(gw.graft(model, gw.Fusion(of=["a", "e"]), "f2", head=False), 11)
    gw.remove(model, "f")
    leave_init(gw.graft(model, gw.Parallel(d=3), "f", head=False), 12)
    return model


@pytest.mark.parametrize("e", MIXTURES)
def test_no_expression_is_walked_and_no_name_is_looked_up_in_a_pass(e: str) -> None:
    model, inputs = mixtures(), BY_NAME["bert"].inputs()
    gw.activate(model, e)
    with patch.object(Expr, "__getattribute__", side_effect=AssertionError("an expression was read")):
        out = forward(model, inputs).sum()
        if out.requires_grad:
            out.backward()
        output(model, inputs)


@pytest.mark.parametrize("e", MIXTURES)
def test_compiled_and_checkpointed_equal_eager(e: str) -> None:
    model, inputs = mixtures(), BY_NAME["bert"].inputs()
    gw.activate(model, e)
    want = output(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: model(**given).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(**inputs), want)
    if not any(p.requires_grad for p in model.parameters()):
        return
    grads = []
    trained = [p for n in gw.parse(e).names() for p in gw.adapters(model)[n].parameters()]
    if "fuse" in e:
        trained += [*gw.adapters(model)["f2"].parameters()]
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
        for p in trained:
            p.grad = None
        forward(model, inputs).pow(2).sum().backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in trained])
    assert any(g is not None and g.norm() > 0 for g in grads[0])
    for x, y in zip(*grads, strict=True):
        assert (x is None) == (y is None) and (x is None or y is None or torch.allclose(x, y, atol=1e-6))


def test_copies_carry_on() -> None:
    model, inputs = mixtures(), BY_NAME["bert"].inputs()
    gw.activate(model, "fuse(a, e) >> b")
    want, other = output(model, inputs), copy.deepcopy(model)
    assert torch.equal(output(other, inputs), want)
    with torch.no_grad():
        for p in gw.adapters(other)["a"].parameters():
            p.zero_()
    assert not torch.allclose(output(other, inputs), want, atol=1e-5) and torch.equal(output(model, inputs), want)


def test_prototypes_follow_what_they_are_made_of() -> None:
    model, (*names, _), inputs = one_site("low rank")
    gw.activate(model, f'route({", ".join(names)}, by="arrow(top_k=1)")')
    first = output(model, inputs)
    with torch.no_grad():
        for p in gw.adapters(model)[names[0]].parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(9)))
    second = output(model, inputs)
    gw.activate(model, None)
    gw.activate(model, f'route({", ".join(names)}, by="arrow(top_k=1)")')
    close(output(model, inputs), second)
    assert not torch.allclose(first, second, atol=1e-4)


def test_who_learns() -> None:
    model, inputs = mixtures(), BY_NAME["bert"].inputs()
    learns = lambda n: any(p.requires_grad for p in gw.adapters(model)[n].parameters())  # noqa: E731
    for e, wanted in {
        "f2": {"f2"}, "fuse(a, e) >> b": {"f2", "b"}, "split(a=2, e=-1)": {"a", "e"}, "route(a, b, by=arrow)": set(),
        'route(a, b, by="arrow(joint=True)")': {"a", "b"}, "a": {"a"},
    }.items():  # fmt: skip
        gw.activate(model, e)
        assert {n for n in gw.adapters(model) if learns(n)} == wanted, e
    gw.remove(model, "f2")
    gw.graft(model, gw.Fusion(of=["a", "e"], joint=True), "f2", head=False)
    assert learns("a") and learns("e") and learns("f2")
    before = {n: p.detach().clone() for n, p in gw.adapters(model)["a"].named_parameters()}
    forward(model, inputs).sum().backward()
    assert all(p.grad is not None for p in gw.adapters(model)["a"].parameters())
    assert all(torch.equal(before[n], p) for n, p in gw.adapters(model)["a"].named_parameters())


# --- tokens ----------------------------------------------------------------------------------------------------------------


def test_ranges_are_counted_from_the_first_real_token_and_over_the_cache() -> None:
    model, inputs = fresh(BY_NAME["llama"]), BY_NAME["llama"].inputs()
    for name in "ab":
        leave_init(gw.graft(model, gw.LoRA(r=2), name, head=False, seed=ord(name)), ord(name))
    ids, one = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    gw.activate(model, "split(a=4, b=-1)")
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=one).logits
        padded = F.pad(ids, (2, 0)), F.pad(one, (2, 0))
        close(model(input_ids=padded[0], attention_mask=padded[1]).logits[:, 2:], want)
        close(run(model, gw.split(a=ids.shape[1]), {"input_ids": ids}), run(model, "a", {"input_ids": ids}))
        first = model(input_ids=ids[:, :3], attention_mask=one[:, :3], use_cache=True)
        rest = model(input_ids=ids[:, 3:], attention_mask=one, past_key_values=first.past_key_values)
        close(torch.cat([first.logits, rest.logits], 1), want)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids, attention_mask=one, **options)  # type: ignore[operator]
        plain = model.generate(ids, attention_mask=one, use_cache=False, **options)  # type: ignore[operator]
    assert torch.equal(cached, plain)


def test_where_there_are_no_tokens() -> None:
    model, inputs = fresh(BY_NAME["bert"]), BY_NAME["bert"].inputs()
    gw.graft(model, gw.LoRA(r=2, at="pooler, q"), "a", head=False)
    with gw.using(model, "split(a=2)"), pytest.raises(gw.GraftError, match=r"(?s)no tokens in.*drop"):
        output(model, inputs)


# --- heads, files, refusals -----------------------------------------------------------------------------------------------


def test_heads_take_no_part() -> None:
    model, inputs = fresh(BY_NAME["bert"]), BY_NAME["bert"].inputs()
    for name, n in (("a", 5), ("b", 4)):
        leave_init(gw.graft(model, [gw.LoRA(r=2), gw.Full(at="head", outputs=n)], name), ord(name))
    for e in ("split(a=2, b=-1)", "route(a, b, by=uniform)"):
        with pytest.raises(gw.GraftError, match=r"(?s)'a' has a task head of its own.*stack"):
            gw.activate(model, e)
    with pytest.raises(gw.GraftError, match="head of its own"):
        gw.graft(model, gw.Fusion(of=["a", "b"]), "f", head=False)
    fusion = gw.graft(model, [gw.Fusion(of=["a", "b"]), gw.Full(at="head", outputs=3)], "f")
    leave_init(fusion, 3)
    assert output(model, inputs).shape == (3, 3)
    with gw.using(model, "fuse(a, b) | a | b"), torch.no_grad():
        shapes = {k: tuple(v.logits.shape) for k, v in model(**inputs).items()}
    assert shapes == {"fuse(a, b)": (3, 3), "a": (3, 5), "b": (3, 4)}
    c = gw.graft(model, gw.Full(at="head", outputs=2), "c")
    leave_init(c)
    assert run(model, "split(a=2, b=-1) >> c", inputs).shape == (3, 2)


def test_a_fusion_is_an_adapter_like_others(tmp_path: Any) -> None:
    model, inputs = mixtures(), BY_NAME["bert"].inputs()
    want = run(model, "f2", inputs)
    for name in ("a", "e", "f2"):
        gw.save(model, name, tmp_path / name)
    other = fresh(BY_NAME["bert"])
    with pytest.raises(gw.GraftError, match="'a'"):
        gw.load(other, tmp_path / "f2")
    assert not gw.adapters(other)
    for name in ("e", "a", "f2"):
        gw.load(other, tmp_path / name)
    assert torch.equal(output(other, inputs), want)
    gw.remove(other, "a")
    with pytest.raises(gw.GraftError, match="'a'"):
        gw.activate(other, "f2")


@pytest.mark.parametrize(
    ("e", "said"),
    [
        ("fuse(a, q)", "'q'"),
        ("fuse(a, b)", "no adapter was made for it"),
        ("fuse(a, b, by=f2)", "none of those it mixes"),
        ("fuse(a, e, by=c)", "not an adapter of a mixing method"),
        ("fuse(a, a)", "twice"),
        ('fuse(a, drop(a, layers="0"))', "twice"),
        ("route(a, b, by=fusion)", "trains what it mixes by"),
        ("route(a, b, by=lora)", "mixes nothing"),
        ("route(a, b, by=nothing)", "unknown"),
        ("route(a, e, by=arrow)", "low-rank"),
        ("route(a, b, by=\"arrow(combine='before')\")", "ranks"),
        ("route(a, c, by=\"arrow(combine='before')\")", "low"),
        ("route(a, b, by=arrow) >> c", "in front"),
        ("split(a=0)", "number of tokens"),
        ("split(a=-1, b=2)", "all that are left"),
        ("fuse()", "expected"),
        ("fuse(a | b)", "branches inside of fuse"),
    ],
)
def test_refusals_change_nothing(e: str, said: str) -> None:
    model, inputs = mixtures(), BY_NAME["bert"].inputs()
    gw.activate(model, "0.5*a + e")
    before, was = state(model), output(model, inputs)
    with pytest.raises(gw.GraftError) as caught:
        gw.activate(model, e)
    assert said in str(caught.value), caught.value
    assert gw.active(model) == "0.5*a + e"
    assert_same(model, before)
    assert torch.equal(output(model, inputs), was)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (lambda: gw.Fusion(), "mixes nothing"),
        (lambda: gw.Fusion(of=["a", "a"]), "twice"),
        (lambda: gw.Fusion(of=["a", "nobody"]), "'nobody'"),
        (lambda: gw.Fusion(of=["a >>"]), "expected"),
        (lambda: gw.Fusion(of=["a", "p"]), "has no sum"),
    ],
)
def test_a_fusion_that_cannot_be(method: Any, said: str) -> None:
    model, inputs = mixtures(), BY_NAME["bert"].inputs()
    gw.graft(model, gw.Prompt(length=2), "p", head=False)
    gw.activate(model, "a")
    before, was = state(model), output(model, inputs)
    with pytest.raises(gw.GraftError) as caught:
        gw.graft(model, method(), "new", head=False)
    assert said in str(caught.value), caught.value
    assert gw.active(model) == "a" and "new" not in gw.adapters(model)
    assert_same(model, before)
    assert torch.equal(output(model, inputs), was)


def test_what_cannot_be_merged_or_read() -> None:
    model = mixtures()
    for e in ("route(a, b, by=arrow)", "f2", "split(a=2, b=-1)"):
        gw.activate(model, e)
        with pytest.raises(gw.GraftError):
            gw.merge(model)
        assert gw.active(model) == e
    gw.activate(model, "route(a, b, by=arrow)")
    q: Any = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert isinstance(q.weight, nn.Parameter)  # outside of a pass: the stored one

    class Reads(OneSite):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(self.first(x), self.site.weight))  # type: ignore[arg-type]

    reader = Reads(nn.Linear(20, 20), 20)
    for name in "ab":
        gw.graft(reader, gw.LoRA(r=2, at=SITE), name, head=False)
    gw.activate(reader, "route(a, b, by=uniform)")
    with pytest.raises(gw.GraftError, match=r"(?s)each token has another one"):
        reader(torch.randn(2, 12))


# --- the norm that is passed twice ------------------------------------------------------------------------------------------


def test_adapters_at_a_norm_follow_one_another() -> None:
    """MAD-X: LA = A_l(LN(f + r)) + f, TA = A_t(LN(LA + r)) + LA, LN(TA + r); sums and mixtures of the same."""
    torch.manual_seed(0)
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=30)
    model = BertModel(config, add_pooling_layer=False).eval()
    for name in "lt":
        made = gw.Bottleneck(d=4, position="sum", at="norm")
        leave_init(gw.graft(model, made, name, head=False, seed=ord(name)), ord(name))
    key = "encoder.layer.0.output.LayerNorm"
    norm: Any = model.get_submodule(key)
    seen: list[Tensor] = []
    gw.activate(model, None)
    ids = torch.randint(0, 30, (2, 5))
    for adapter in gw.adapters(model).values():  # only behind the feed-forward layer
        for k, delta in adapter.parts[0].deltas.items():
            if key not in k:
                for p in delta.parameters():
                    p.detach().zero_()
    handle = norm.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    z = seen[0]
    ln = lambda x: F.layer_norm(x, (16,), norm.weight, norm.bias, norm.eps)  # noqa: E731
    branch = {n: next(d for k, d in gw.adapters(model)[n].parts[0].deltas.items() if key in k).branch for n in "lt"}  # type: ignore[operator]

    def out(e: str) -> Tensor:
        with gw.using(model, e), torch.no_grad():
            return model(ids).last_hidden_state

    with torch.no_grad():
        one = z + branch["l"](ln(z))
        want = {
            "l": one,
            "l >> t": one + branch["t"](ln(one)),
            "0.5*l - t": z + 0.5 * branch["l"](ln(z)) - branch["t"](ln(z)),
            "split(l=2, t=-1)": torch.cat([one[:, :2], (z + branch["t"](ln(z)))[:, 2:]], 1),
            "route(l >> t, t, by=uniform)": (one + branch["t"](ln(one)) + z + branch["t"](ln(z))) / 2,
        }
        for e, inside in want.items():
            close(out(e), ln(inside))
        close(out("rows(l, none)"), torch.cat([ln(one)[:1], ln(z)[1:]]))
    assert not torch.allclose(out("l >> t"), out("t >> l"), atol=1e-6)
