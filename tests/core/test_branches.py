"""`a | b`: each output is to the bit what its branch gives alone, and what lies below the adapters runs once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.cases import leave_init
from conformance.hosts import BY_NAME, bert, forward, fresh, output
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from test_graft import assert_same, state
from test_rows import grafted, placed
from test_sums import CROWDS, anyone, refused, run
from torch import Tensor, nn

import graftwork as gw


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def branches(model: nn.Module, e: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with gw.using(model, e), torch.no_grad():
        return {text: first(out) for text, out in model(**inputs).items()}


@pytest.mark.parametrize("host", CROWDS)
@given(data=st.data())
@limits(max_examples=15, deadline=None)
def test_each_branch_is_what_it_is_alone(host: str, data: st.DataObject) -> None:
    model, inputs = CROWDS[host][0], BY_NAME[host].inputs()
    a, b, c = map(gw.A, data.draw(anyone(host, 3)))
    some = [a, b, 0.5 * a - b, a + c, gw.drop(a, "0"), gw.drop(b, "0") + gw.drop(c, "0"), 0 * c, gw.mean(a, b)]
    chosen = data.draw(st.lists(st.sampled_from(some), min_size=2, max_size=4, unique_by=str))
    e = chosen[0] | chosen[1]
    for other in chosen[2:]:
        e = e | other
    assert gw.parse(str(e)) == e
    got = branches(model, e, inputs)
    assert list(got) == [t.name if isinstance(t, gw.A) else str(t) for t in chosen]
    for branch, out in zip(chosen, got.values(), strict=True):
        assert torch.equal(out, run(model, branch, inputs))


def pair(layers: str = "1") -> tuple[nn.Module, dict[str, Tensor]]:
    """Two adapters on the upper block of a BERT."""
    methods = gw.LoRA(r=2, layers=layers), gw.Bottleneck(d=3, layers=layers)
    return grafted("bert", *methods), BY_NAME["bert"].inputs()


class Counted:
    """How often modules run their own forward."""

    def __init__(self, *modules: Any) -> None:
        self.calls = 0
        self.handles = [m.register_forward_hook(self.note) for m in modules]

    def note(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_shared_lower_part_runs_once(mode: Any) -> None:
    model, inputs = pair()
    alone = {name: run(model, name, inputs) for name in ("a", "b", None)}
    lower = Counted(model.bert.embeddings.word_embeddings, model.bert.encoder.layer[0].intermediate.dense)
    upper = Counted(model.bert.encoder.layer[1].intermediate.dense)
    with gw.using(model, "a | b | 0*a"), mode():
        out = model(**inputs)
    assert (lower.calls, upper.calls) == (2, 3)
    for text, name in {"a": "a", "b": "b", "0*a": None}.items():
        torch.testing.assert_close(first(out[text]).detach(), alone[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_in_the_lower_part_of_one_branch_only() -> None:
    model, inputs = pair()
    leave_init(gw.graft(model, gw.IA3(layers="0"), "c", head=False))
    lower = Counted(model.bert.encoder.layer[0].intermediate.dense)
    for e in ("a | c", "c | a", "a | a >> c | b"):
        lower.calls = 0
        for text, out in branches(model, e, inputs).items():
            assert torch.equal(out, run(model, text, inputs)), (e, text)
        assert lower.calls > len(e.split("|"))


def test_an_output_that_is_written_into_is_not_used_again() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.site = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.low(x)
            y = self.site(h)
            return h.add_(y)

    torch.manual_seed(0)
    model, x = Writes().eval(), torch.randn(3, 4)
    for name in "ab":
        leave_init(gw.graft(model, gw.LoRA(r=2, at="/site/"), name, head=False), ord(name))
    alone = {name: run(model, name, {"x": x}) for name in "ab"}
    for mode in (torch.no_grad, torch.inference_mode):
        with gw.using(model, "a | b"), mode():
            out = model(x)
        assert all(torch.equal(out[name], alone[name]) for name in "ab")


def test_heads_of_their_own() -> None:
    methods = [[gw.LoRA(r=2, layers="1"), gw.Full(at="head", outputs=n)] for n in (2, 5)]
    model, inputs = grafted("bert", *methods, head=None), BY_NAME["bert"].inputs()
    got = branches(model, "a | b", inputs)
    assert {name: out.shape[1] for name, out in got.items()} == {"a": 2, "b": 5}
    for name, out in got.items():
        assert torch.equal(out, run(model, name, inputs))


@pytest.mark.parametrize(
    "host", ["llama", "t5", "gpt2", "vit", "encoder", "linear_read", "conv2d", "experts", "multihead"]
)
def test_hosts(host: str) -> None:
    kind = BY_NAME[host]
    model, inputs = grafted(host, *(placed(m, kind.at) for m in (gw.LoRA(r=3), gw.DoRA(r=2)))), kind.inputs()
    for text, out in branches(model, "a | 0.5*b | a >> b", inputs).items():
        assert torch.equal(
            out, run(model, text, inputs | ({"use_cache": False} if host in ("llama", "gpt2", "t5") else {}))
        )


@pytest.mark.parametrize("method", [gw.Prompt(length=2), gw.Ladder(r=3)])
def test_methods_that_have_no_sum_stand_beside_others(method: Any) -> None:
    model, inputs = pair()
    leave_init(gw.graft(model, method, "x", head=False))
    for text, out in branches(model, "x | a | b", inputs).items():
        assert torch.equal(out, run(model, text, inputs))


def test_gradients_reach_each_branch() -> None:
    model, inputs = pair("0-1")
    gw.activate(model, "a | b")
    sum(out.logits.pow(2).sum() for out in model(**inputs).values()).backward()
    got = {n: [p.grad.clone() for p in gw.adapters(model)[n].parameters()] for n in "ab"}
    for name in "ab":
        for p in gw.adapters(model)[name].parameters():
            p.grad = None
        gw.activate(model, name)
        forward(model, inputs).pow(2).sum().backward()
        for p, g in zip(gw.adapters(model)[name].parameters(), got[name], strict=True):
            torch.testing.assert_close(g, p.grad)


def test_compiled_equals_eager() -> None:
    model, inputs = pair()
    gw.activate(model, "a | b")
    want = {text: out.logits for text, out in model(**inputs).items()}
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **given: {t: o.logits for t, o in model(**given).items()}, fullgraph=True, backend="aot_eager"
    )
    got = compiled(**inputs)
    for text, out in want.items():
        torch.testing.assert_close(got[text], out)


def test_afterwards_the_model_is_what_it_was() -> None:
    model, inputs = pair()
    gw.activate(model, "a")
    before, was = state(model), output(model, inputs)
    branches(model, "a | b", inputs)
    other = copy.deepcopy(model)
    assert_same(model, before)
    assert torch.equal(output(model, inputs), was)
    gw.activate(other, "a | b")
    again = copy.deepcopy(other)
    assert all(
        torch.equal(first(x), first(y)) for x, y in zip(again(**inputs).values(), other(**inputs).values(), strict=True)
    )
    for name in "ab":
        gw.remove(model, name)
    assert torch.equal(output(model, inputs), output(fresh(BY_NAME["bert"]), inputs))


@pytest.mark.parametrize(
    "e",
    [
        "a | a",
        "a | b | a",
        "a | q",
        "a | b >> b",
        "rows(a, none) | b",
        "(a | b) >> a",
        "a + (a | b)",
        "mean(a | b)",
        "a |",
    ],
)
def test_refusals(e: str) -> None:
    model, inputs = pair()
    gw.activate(model, "a")
    refused(model, e, inputs)


def test_rows_of_branches() -> None:
    with pytest.raises(gw.GraftError, match="branches inside"):
        gw.rows([gw.A("a") | "b", None])


def test_what_branches_cannot_do() -> None:
    model, inputs = pair()
    gw.activate(model, "a | b")
    with pytest.raises(gw.GraftError, match="all branches"):
        gw.merge(model)
    with pytest.raises(gw.GraftError, match="called by itself"):
        model.bert(**inputs)
    model, ids = grafted("llama", gw.LoRA(r=2), gw.LoRA(r=2)), BY_NAME["llama"].inputs()["input_ids"]
    gw.activate(model, "a | b")
    with pytest.raises(gw.GraftError, match="cache"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    with pytest.raises(gw.GraftError, match="cache"):
        model(ids, use_cache=True)
    assert model(ids)["a"].past_key_values is None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with pytest.raises(gw.GraftError, match="gradient checkpointing"):
        sum(out.logits.sum() for out in model(ids).values()).backward()


def test_branches_of_a_bert_without_adapters_below_are_cheap() -> None:
    """The number of modules that run: the lower block once, the upper one for each branch."""
    model = bert().eval()
    for name in "abc":
        gw.graft(model, gw.LoRA(r=2, layers="1"), name, head=False)
    inputs = BY_NAME["bert"].inputs()
    blocks = [Counted(layer.output.dense) for layer in model.bert.encoder.layer]
    branches(model, "a | b | c", inputs)
    assert [block.calls for block in blocks] == [1, 3]
