"""Sums of adapters: the laws, closed forms, fast paths and refusals. Adapters of mixed methods stand on one model."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conformance.cases import close, leave_init
from conformance.hosts import BY_NAME, bert, forward, fresh, output
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from test_graft import assert_same, state
from test_rows import ABSENT, METHODS, grafted, placed
from torch import Tensor, nn

import graftwork as gw
from graftwork.core.plan import Plan
from graftwork.expressions.algebra import Expr
from graftwork.expressions.sums import LowRankSum

MERGEABLE = {"lora", "lora of two ranks", "dora", "vera", "adalora", "ia3", "bitfit", "ln_tuning", "embedding"}
MERGEABLE |= {"whole linear", "dora, ia3", "lora and ia3 on one layer"}


def crowd(host: str, labels: list[str]) -> tuple[nn.Module, list[str]]:
    """The host's model with the adapters of these labels, two of each, away from their initial values."""
    model, names = fresh(BY_NAME[host]), []
    for i, label in enumerate(labels):
        for j, method in enumerate(METHODS[label]):
            if (host, label) not in ABSENT:
                names.append(f"{label} {j}")
                leave_init(gw.graft(model, method, names[-1], head=False, seed=i), 2 * i + j)
    return model, names


CROWDS = {host: crowd(host, list(METHODS)) for host in ("bert", "llama", "vit")}
WEIGHTS = {
    host: crowd(host, sorted(MERGEABLE - ({"embedding"} if host == "vit" else set()))) for host in ("bert", "vit")
}


def run(model: nn.Module, e: Expr | str | None, inputs: dict[str, Tensor]) -> Tensor:
    with gw.using(model, e):
        return output(model, inputs)


def refused(model: nn.Module, e: str, inputs: dict[str, Tensor], said: str | None = None) -> None:
    """An expression that is a GraftError, after which the model is what it was."""
    active, before, was = gw.active(model), state(model), output(model, inputs)
    with pytest.raises(gw.GraftError, match=said):
        gw.activate(model, e)
    assert gw.active(model) == active
    assert_same(model, before)
    assert torch.equal(output(model, inputs), was)


def anyone(host: str, n: int, among: dict[str, Any] = CROWDS) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(among[host][1]), min_size=n, max_size=n, unique=True)


@pytest.mark.parametrize("host", CROWDS)
@given(data=st.data())
@limits(max_examples=25, deadline=None)
def test_the_laws(host: str, data: st.DataObject) -> None:
    model, inputs = CROWDS[host][0], BY_NAME[host].inputs()
    a, b, c = map(gw.A, data.draw(anyone(host, 3)))
    s, t = data.draw(st.sampled_from([0.7, -0.3, 1.0, 2.0])), data.draw(st.sampled_from([0.25, -1.0, 1.0]))
    close(run(model, s * a + t * b, inputs), run(model, t * b + s * a, inputs))
    assert torch.equal(run(model, a + b - b, inputs), run(model, a, inputs))
    assert torch.equal(run(model, a - a, inputs), run(model, None, inputs))
    assert torch.equal(run(model, 0 * a, inputs), run(model, None, inputs))
    assert torch.equal(run(model, 1 * a, inputs), run(model, a, inputs))
    assert torch.equal(run(model, gw.mean(a, a), inputs), run(model, a, inputs))
    close(run(model, gw.mean(a, b), inputs), run(model, 0.5 * a + 0.5 * b, inputs))
    if not any("mixture" in e.name for e in (a, b, c)):  # its weight differs by token: no other may be made from it
        assert torch.equal(run(model, (a >> b) >> c, inputs), run(model, a >> (b >> c), inputs))
    close(run(model, a - b + c, inputs), run(model, c - b + a, inputs))
    close(run(model, a + (s * a + t * b), inputs), run(model, (1 + s) * a + t * b, inputs))


@pytest.mark.parametrize("host", CROWDS)
def test_half_of_every_adapter_is_neither_it_nor_the_backbone(host: str) -> None:
    model, names = CROWDS[host]
    inputs = BY_NAME[host].inputs()
    own = run(model, None, inputs)
    for name in names:
        half, whole = run(model, 0.5 * gw.A(name), inputs), run(model, gw.A(name), inputs)
        assert not torch.allclose(half, own, atol=1e-5) and not torch.allclose(half, whole, atol=1e-5), name
        # near the backbone, twice the factor is twice the change
        little, twice = (run(model, c * gw.A(name), inputs) - own for c in (2e-3, 4e-3))
        assert little.norm() > 0 and (twice - 2 * little).norm() < 0.1 * twice.norm(), name


@pytest.mark.parametrize("host", WEIGHTS)
@given(data=st.data())
@limits(max_examples=15, deadline=None)
def test_a_sum_of_weight_methods_is_the_sum_of_what_merging_each_changes(host: str, data: st.DataObject) -> None:
    model, inputs = WEIGHTS[host][0], BY_NAME[host].inputs()
    a, b, c = map(gw.A, data.draw(anyone(host, 3, WEIGHTS)))
    s, t = data.draw(st.sampled_from([0.7, -0.3, 1.0])), data.draw(st.sampled_from([0.25, -1.0, 1.0]))

    def merged(e: Expr) -> dict[str, Tensor]:
        gw.activate(model, e)
        gw.merge(model)
        try:
            return {k: p.detach().clone() for k, p in model.named_parameters() if "graft" not in k}
        finally:
            gw.unmerge(model)
            gw.activate(model, None)

    plain = fresh(BY_NAME[host])
    base = dict(plain.named_parameters())
    alone = [(s, merged(a)), (t, merged(b >> c))]
    with torch.no_grad():
        for key, p in base.items():
            p.add_(sum(f * (w[key] - p) for f, w in alone))  # type: ignore[arg-type]
    want = output(plain, inputs)
    e = s * a + t * (b >> c)
    close(run(model, e, inputs), want)
    together = merged(e)
    for key, p in base.items():
        close(together[key], p)


# --- closed forms at one site, with nothing but linear maps behind it --------------------------------------------------


class OneSite(nn.Module):
    """first -> site -> last, without anything non-linear: the output is affine in what the site computes."""

    def __init__(self, site: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.site, self.last = nn.Linear(12, 20), site, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.site(self.first(x)))


SITE = "/^site$/"
GROUPS: dict[str, list[Any]] = {
    "low rank": [gw.LoRA(r=2, at=SITE), gw.LoRA(r=5, rslora=True, at=SITE), gw.AdaLoRA(at=SITE)],
    "weights": [
        gw.DoRA(r=2, at=SITE),
        gw.IA3(at=SITE),
        gw.LoRA(r=3, bias=True, at=SITE),
        gw.Full(at=SITE),
        gw.BitFit(at=SITE),
    ],
    "fast": [gw.DoRA(r=2, at=SITE), gw.IA3(at=SITE), gw.VeRA(r=8, at=SITE), gw.BitFit(at=SITE), gw.LoRA(r=2, at=SITE)],
    "mixtures": [
        gw.Mixture(of=gw.LoRA(r=2), at=SITE),
        gw.Mixture(of=gw.IA3(), at=SITE),
        [gw.DoRA(r=2, at=SITE), gw.IA3(at=SITE), gw.BitFit(at=SITE)],
        gw.LoRA(r=2, at=SITE),
        gw.Full(at=SITE),
    ],
    "outputs": [
        gw.Bottleneck(d=3, at=SITE),
        gw.Bottleneck(d=4, norm="after", act="relu", at=SITE),
        gw.Bottleneck(d=4, position="parallel", at=SITE),
        gw.LoReFT(r=2, positions="p1+s1", at=SITE),
        gw.PHM(d=4, at=SITE),
        gw.Sparse(of=gw.Bottleneck(d=4), at=SITE),
    ],
}


def one_site(group: str) -> tuple[nn.Module, list[str], dict[str, Tensor]]:
    torch.manual_seed(1)
    model = OneSite(nn.Linear(20, 20), 20).eval()
    names = []
    for i, method in enumerate(GROUPS[group]):
        names.append(f"m{i}")
        leave_init(gw.graft(model, method, names[-1], head=False, seed=i), i)
    return model, names, {"x": torch.randn(3, 6, 12)}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("learning", [False, True])
def test_a_sum_changes_the_output_by_the_sum_of_the_changes(group: str, learning: bool) -> None:
    model, names, inputs = one_site(group)

    def out(e: Any) -> Tensor:
        with gw.using(model, e):
            return forward(model, inputs) if learning else output(model, inputs)

    own = out(None)
    factors = [0.7, -0.4, 1.0, 0.25, 2.0, -1.0]
    terms = [c * gw.A(name) for c, name in zip(factors, names, strict=False)]
    want = own + sum(c * (out(name) - own) for c, name in zip(factors, names, strict=False))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    close(out(total), want)
    close(out(f"mean({', '.join(names)})"), own + sum(out(name) - own for name in names) / len(names))
    if group == "mixtures":  # one of vectors cannot follow another change of its weight
        return
    pair = out(f"{names[0]} >> {names[1]}")
    close(out(f"0.5*({names[0]} >> {names[1]}) - 2*{names[-1]}"), own + 0.5 * (pair - own) - 2 * (out(names[-1]) - own))


def test_sums_of_attention() -> None:
    inputs = BY_NAME["multihead_whole"].inputs()
    model = grafted("multihead_whole", gw.Prefix(length=3, at="attn"), gw.Prefix(length=2, at="attn"))
    own, a, b, ab = (run(model, e, inputs) for e in (None, "a", "b", "a >> b"))
    close(run(model, "0.7*a - 0.2*b", inputs), own + 0.7 * (a - own) - 0.2 * (b - own))
    close(run(model, "0.7*(a >> b) + b", inputs), own + 0.7 * (ab - own) + (b - own))


@pytest.mark.parametrize("host", ["conv2d", "conv2d_reflect", "conv1d", "embedding", "packed_qkv", "gpt2", "t5", "linear_wide",
                                  "linear_read", "multihead", "experts", "encoder"])  # fmt: skip
def test_every_kind_of_host(host: str) -> None:
    kind = BY_NAME[host]
    made = [placed(method, kind.at) for method in (gw.LoRA(r=3), gw.DoRA(r=2), gw.LoRA(r=2, rslora=True))]
    model, inputs = grafted(host, *made), kind.inputs()
    for e in ("0.7*a - 0.2*b", "a + 0.5*c", "mean(a, b, c)", "0.5*(a >> b) + c", "(0.3*a + c) >> b"):
        gw.activate(model, e)
        want = output(model, inputs)
        assert not torch.allclose(want, run(model, "a", inputs), atol=1e-4)
        if host == "multihead":
            continue
        gw.merge(model)
        close(output(model, inputs), want)
        gw.unmerge(model)
        close(output(model, inputs), want)


# --- fast paths, compilation, training ---------------------------------------------------------------------------------


def test_low_rank_sums_are_one_low_rank_update() -> None:
    model, inputs = fresh(BY_NAME["llama"]), BY_NAME["llama"].inputs()
    for name, r in (("a", 2), ("b", 3), ("c", 4)):
        leave_init(gw.graft(model, gw.LoRA(r=r), name, head=False), r)
    gw.activate(model, "0.7*a + 0.3*(b >> c)")
    q: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    [(only, host)] = q._armed.plan.linear
    assert isinstance(only, LowRankSum) and only.factors()[0].shape[0] == 9 and host.direct and not q._armed.plan.keeps
    with patch.object(Plan, "adapted", side_effect=AssertionError("a dense weight was made")):
        output(model, inputs)


@pytest.mark.parametrize("e", ["0.7*a + 0.3*b", "0.5*a - c", "mean(d, c) >> a", "0.5*e + 0.5*f", "0.3*g + a"])
def test_no_expression_is_walked_and_no_name_is_looked_up_in_a_pass(e: str) -> None:
    model, inputs = several(), BY_NAME["bert"].inputs()
    gw.activate(model, e)

    class Watched(dict[str, Any]):
        asked = 0

        def __getitem__(self, key: str) -> Any:
            Watched.asked += 1
            return super().__getitem__(key)

        get = keys = values = items = __iter__ = __contains__ = None  # type: ignore[assignment]

    root: Any = model._modules["graft"]
    adapters, root.adapters = root.adapters, Watched(root.adapters)
    try:
        with patch.object(Expr, "__getattribute__", side_effect=AssertionError("an expression was read")):
            forward(model, inputs).sum().backward()
            output(model, inputs)
        assert Watched.asked == 0
    finally:
        root.adapters = adapters


def several() -> nn.Module:
    edits = gw.Bottleneck(d=3), gw.Parallel(d=3), gw.Prefix(length=2)  # e, f, g
    return grafted("bert", gw.LoRA(r=2), gw.LoRA(r=4), gw.DoRA(r=2), gw.IA3(), *edits)


@pytest.mark.parametrize("e", ["0.7*a + 0.3*b", "0.5*a - c + d", "mean(e, a)", "0.5*e + f", "0.3*g + a"])
def test_compiled_equals_eager(e: str) -> None:
    model, inputs = several(), BY_NAME["bert"].inputs()
    gw.activate(model, e)
    want = output(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: model(**given).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(**inputs), want)


@pytest.mark.parametrize("e", ["0.7*a + 0.3*b", "0.5*a - c + d", "mean(e, a)", "0.5*e + f", "0.3*g - a"])
def test_gradients_are_those_of_the_closed_form(e: str) -> None:
    model, inputs = several(), BY_NAME["bert"].inputs()
    gw.activate(model, e)

    def loss() -> Tensor:
        return forward(model, inputs).pow(2).sum()

    for adapter in gw.adapters(model).values():
        for p in adapter.parameters():
            p.data = p.data.double()
    model.double()
    loss().backward()
    for name in gw.parse(e).names():
        p = max(gw.adapters(model)[name].parameters(), key=lambda t: t.numel())
        assert p.grad is not None
        way = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
        with torch.no_grad():
            p.add_(1e-6 * way)
            up = loss()
            p.sub_(2e-6 * way)
            down = loss()
            p.add_(1e-6 * way)
        if name == "c":  # its gradient holds |V| constant, by the paper
            continue
        torch.testing.assert_close((p.grad * way).sum(), (up - down) / 2e-6, rtol=1e-4, atol=1e-7)


def test_dropout_of_a_sum_is_that_of_its_members() -> None:
    torch.manual_seed(0)
    model = OneSite(nn.Linear(20, 20), 20)
    for name, p in (("a", 0.5), ("b", 0.5), ("c", 0.0)):
        leave_init(gw.graft(model, gw.LoRA(r=2, dropout=p, at=SITE), name, head=False), ord(name))
    x = torch.randn(400, 12)
    for e in ("a + b", "0.5*a - c"):
        gw.activate(model, e)
        model.eval()
        want = model(x).detach()
        model.train()
        drawn = torch.stack([model(x).detach() for _ in range(64)])
        assert drawn.std(0).max() > 0.1
        assert (drawn.mean((0, 1)) - want.mean(0)).abs().max() < 0.1 * drawn.std(0).mean()


@pytest.mark.parametrize(
    ("e", "changed"), [("0.5*c + 0.5*d", "c"), ("0.5*c + 0.5*d", "d"), ("0.5*a - b", "b"), ("-a", "a")]
)
def test_a_changed_parameter_is_seen_in_what_is_kept(e: str, changed: str) -> None:
    model, inputs = several(), BY_NAME["bert"].inputs()
    gw.activate(model, e)
    first = output(model, inputs)
    assert torch.equal(first, output(model, inputs))
    with torch.no_grad():
        for p in gw.adapters(model)[changed].parameters():
            p.mul_(1.5)
    second = output(model, inputs)
    assert not torch.allclose(first, second, atol=1e-4)
    gw.keep_weights(model, False)
    close(output(model, inputs), second)


def test_copies_carry_on() -> None:
    model, inputs = several(), BY_NAME["bert"].inputs()
    gw.activate(model, "0.5*a + 0.3*b - c + e >> f")
    want, other = output(model, inputs), copy.deepcopy(model)
    assert gw.active(other) == "(0.5*a + 0.3*b - c + e) >> f" and torch.equal(output(other, inputs), want)
    with torch.no_grad():
        for p in gw.adapters(other)["a"].parameters():
            p.zero_()
    assert not torch.allclose(output(other, inputs), want, atol=1e-4)
    assert torch.equal(output(model, inputs), want)


# --- drop, rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "c", "e", "f", "g"])
def test_drop_leaves_the_other_layers(name: str) -> None:
    model, inputs = several(), BY_NAME["bert"].inputs()
    head = gw.graft(model, gw.Full(at="head"), "head", head=False)
    leave_init(head)
    bare, whole = run(model, None, inputs), run(model, name, inputs)
    upper, lower = run(model, f'drop({name}, layers="0")', inputs), run(model, gw.drop(name, "-1"), inputs)
    assert torch.equal(run(model, gw.drop(name, "0-1"), inputs), bare)
    assert not any(torch.allclose(x, y, atol=1e-5) for x, y in ((upper, bare), (upper, whole), (lower, upper)))
    # only the upper layer: the lower one computes what the backbone does
    states = {}
    for e in (None, gw.drop(name, "0")):
        with gw.using(model, e), torch.no_grad():
            states[e] = model(**inputs, output_hidden_states=True).hidden_states
    first, second = states.values()
    assert torch.equal(first[1], second[1]) and not torch.equal(first[2], second[2])
    with pytest.raises(gw.GraftError, match="no layer"):
        gw.activate(model, gw.drop("head", "0-1"))
    close(run(model, gw.drop(gw.A(name) + "head", "0"), inputs), run(model, gw.drop(name, "0") >> gw.A("head"), inputs))


@pytest.mark.parametrize("host", CROWDS)
@given(data=st.data())
@limits(max_examples=12, deadline=None)
def test_rows_over_expressions(host: str, data: st.DataObject) -> None:
    model, inputs = CROWDS[host][0], BY_NAME[host].inputs()
    a, b, c = map(gw.A, data.draw(anyone(host, 3)))
    entries: list[Any] = [0.5 * a + 0.5 * b, None, a - 0.3 * c, b, gw.drop(a, "0"), 2 * a]
    if not any("mixture" in e.name for e in (a, b, c)):
        entries.append(gw.mean(a, b) >> c)
    chosen = data.draw(st.lists(st.sampled_from(entries), min_size=3, max_size=3))
    try:
        got = run(model, gw.rows(chosen), inputs)
    except gw.GraftError as error:
        assert "read different inputs" in str(error)
        return
    for i, e in enumerate(chosen):
        close(got[i : i + 1], run(model, e, {k: v[i : i + 1] for k, v in inputs.items()}))


def test_rows_of_low_rank_sums_are_one_group() -> None:
    model = bert().eval()
    for name in "abc":
        leave_init(gw.graft(model, gw.LoRA(r=2), name, head=False), ord(name))
    gw.activate(model, gw.rows(["0.5*a + 0.5*b", "a - c", "b"]))
    q: Any = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    kinds = [type(step).__name__ for step in q._armed.plan.rowwise]
    assert set(kinds) == {"LowRanks"} and len(kinds) <= 2


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (gw.Prompt(length=2), "prompt of 'x'"),
        (gw.Ladder(r=3), "ladder of 'x'"),
        (gw.Prefix(length=2, at="attn, entry"), "prefix of 'x'"),
    ],
)
def test_methods_without_a_sum(method: Any, said: str) -> None:
    model, inputs = (
        (fresh(BY_NAME["gpt2"]), BY_NAME["gpt2"].inputs())
        if method.name == "prefix"
        else (several(), BY_NAME["bert"].inputs())
    )
    gw.graft(model, method, "x", head=False)
    gw.graft(model, gw.LoRA(r=2), "y", head=False)
    before, was = state(model), output(model, inputs)
    for e in ("0.5*x + 0.5*y", "-x", "mean(x, y)", "y + (x >> y)"):
        with pytest.raises(gw.GraftError, match=r"(?s)has no sum.*do: stack it") as caught:
            gw.activate(model, e)
        assert said in str(caught.value)
        assert gw.active(model) == "y"
    assert_same(model, before)
    assert torch.equal(output(model, inputs), was)
    gw.activate(model, "x >> (0.5*y + 0.5*y)")  # beside a sum it may stand
    output(model, inputs)


@pytest.mark.parametrize(
    ("e", "said"),
    [
        ("0.5*a + 0.5*q", "'q'"),
        ("0*q + a", "'q'"),
        ("a >> a", "twice"),
        ("(a + b) >> a", "twice"),
        ('drop(a, layers="7")', "layers"),
        ("mean()", "expected"),
        ("a + ", "expected"),
    ],
)
def test_refusals_change_nothing(e: str, said: str) -> None:
    model = several()
    gw.activate(model, "0.5*a + e")
    refused(model, e, BY_NAME["bert"].inputs(), said)
    gw.activate(model, None)
    with pytest.raises(gw.GraftError, match=said), gw.using(model, e):
        pass
    assert gw.active(model) is None


def test_heads_in_a_sum() -> None:
    methods = [[gw.LoRA(r=2), gw.Full(at="head", outputs=n)] for n in (5, 5, None, None)]
    model, inputs = grafted("bert", *methods, head=None), BY_NAME["bert"].inputs()
    assert run(model, "0.3*a + 0.7*b", inputs).shape == (3, 5)
    heads = {n: run(model, n, inputs) for n in "ab"}
    assert not any(torch.allclose(run(model, "mean(a, b)", inputs), h, atol=1e-4) for h in heads.values())
    assert run(model, "a + 0.5*c - 0.5*c", inputs).shape == (3, 5)
    for e in ("a + b", "0.5*a", "0.5*a + 0.5*c", "c + a"):
        with pytest.raises(gw.GraftError, match=r"(?s)a sum at.*of shapes"):
            gw.activate(model, e)
    close(run(model, "0.5*c + 0.5*d", inputs), run(model, "0.5*d + 0.5*c", inputs))


def test_merging_a_sum_that_cannot_be_merged() -> None:
    model = several()
    gw.activate(model, "0.5*a + 0.5*e")
    with pytest.raises(gw.GraftError, match="bottleneck"):
        gw.merge(model)
    assert gw.active(model) == "0.5*a + 0.5*e"


def test_a_norms_input_edited_by_one_adapter_twice() -> None:
    before = gw.Bottleneck(d=3, position="before", at="mlp")
    model, inputs = grafted("llama", before, before), BY_NAME["llama"].inputs()
    close(run(model, "0.5*a + 0.5*b", inputs), run(model, "mean(b, a)", inputs))
    with pytest.raises(gw.GraftError, match="two terms"):
        gw.activate(model, "a + (a >> b)")


def test_by_hand() -> None:
    """A sum at the output of one linear layer, by hand."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    model = nn.Sequential(layer).eval()
    with torch.no_grad():
        own = F.linear(x, layer.weight, layer.bias)
    for name in "ab":
        leave_init(gw.graft(model, gw.LoRA(r=2, at="linear"), name, head=False), ord(name))
    deltas = {n: next(iter(a.deltas())) for n, a in gw.adapters(model).items()}
    want = own + sum(c * deltas[n].scale * x @ deltas[n].down.T @ deltas[n].up.T for c, n in ((0.7, "a"), (-2.0, "b")))
    with gw.using(model, "0.7*a - 2*b"):
        torch.testing.assert_close(model(x), want)
