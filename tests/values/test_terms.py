"""Composing expressions: the adapter that gw.combine makes of one is what the expression does when it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.core.errors import GraftError

sys.path.insert(0, str(Path(__file__).parent.parent / "systems"))  # for its backbones
sys.path.insert(0, str(Path(__file__).parent.parent / "store"))  # for `look`

from adapter_models import bert
from files import look
from value_models import change, keys, randomly, relative, three, weights_of


def library(model: nn.Module | None = None) -> nn.Module:
    """a, b, c: LoRAs of unequal ranks, sites and scales; vera adds to the weights, dora and ia3 multiply them; soft."""
    model = three(model)
    randomly(model, gw.VeRA(r=3, at="q, up"), "vera", 4)
    randomly(model, gw.DoRA(r=2, at="q, up"), "dora", 5, std=0.1, around=True)
    randomly(model, gw.IA3(at="k, v, down"), "ia3", 6, around=True)
    randomly(model, gw.Bottleneck(d=4), "soft", 7)
    gw.activate(model, None)
    return model


def ids() -> torch.Tensor:
    return torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "e",
    [
        "a",
        "0.5*a + 0.25*b",
        "a - b",
        "-2*mean(a, b, c)",
        "a + a",
        "mean(a - 2*(b - c), 3*a)",
        "a >> b",
        "a >> c >> b",
        "0.5*(a >> b) + 0.5*c",
        "(0.5*a - b) >> c",  # a stack of sums of updates that do not depend on the weight
        "a >> mean(b, c) >> -2*vera",
        'drop(a >> b, layers="0")',
        'b - 0.5*drop(a, layers="-1")',
        'drop(mean(a, b), layers="1") >> c',
        gw.A("a") - 3 * (gw.A("b") >> "vera"),
    ],
)
def test_it_is_what_the_expression_does(e) -> None:
    model = library()
    sites = keys(model, *gw.parse(str(e)).names())
    wanted = {key: change(model, e, key) for key in sites}
    gw.activate(model, e)
    with torch.no_grad():
        out = model(ids()).logits
    made = gw.combine(model, "made", e)
    assert made.error < 1e-6
    assert gw.active(model) == "made"
    for key, dw in wanted.items():
        found = change(model, "made", key) if key in keys(model, "made") else torch.zeros_like(dw)
        assert float((found - dw).norm()) <= 1e-5 * max(1.0, float(dw.norm())), key
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, out, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("e", ["a >> dora", "dora >> a", "0.5*(a >> dora) - 0.5*ia3", "a >> ia3", "ia3 >> b"])
def test_stacks_of_methods_that_read_the_weight(e: str) -> None:
    """Their change is that of the whole stack, which is not the sum of the two."""
    model = library()
    wanted = {key: change(model, e, key) for key in keys(model, *gw.parse(e).names())}
    made = gw.combine(model, "made", e, "svd", r=32)  # the whole rank of every weight
    assert made.error < 1e-5
    for key, dw in wanted.items():
        assert relative(change(model, "made", key), dw) < 1e-5
    if e == "a >> dora":
        apart = {key: change(model, "a", key) + change(model, "dora", key) for key in wanted}
        assert max(relative(apart[key], dw) for key, dw in wanted.items() if dw.norm()) > 1e-2


def test_the_order_of_a_stack_counts() -> None:
    model = library()
    first, then = (gw.combine(model, n, e, "svd", r=32).adapter for n, e in (("x", "a >> ia3"), ("y", "ia3 >> a")))
    key = next(key for key in keys(model, "a") if ":v" in key and key in keys(model, "ia3"))
    assert relative(change(model, first.name, key), change(model, then.name, key)) > 1e-2


def test_what_a_cut_would_lose_is_said_and_right() -> None:
    model = library()
    with pytest.raises(GraftError, match="rank 32, as LoRA larger than the weight") as caught:
        gw.combine(model, "made", "a >> dora")
    assert "--how svd --rank 16" in caught.value.do
    cut = gw.combine(model, "made", "a >> dora", "svd", r=16)
    said = caught.value.do.split("leaves an error of ")[1]
    dense = [fit for fit in cut.sites if fit.site in keys(model, "dora")]
    assert float(said.split()[0]) == pytest.approx(sum(fit.error for fit in dense) / len(dense), abs=1e-3)
    assert float(said.split("average, ")[1].split()[0]) == pytest.approx(max(fit.error for fit in dense), abs=1e-3)


def test_rules_take_the_terms() -> None:
    model = library()
    one = gw.combine(model, "one", "0.5*a + 0.5*b", "ties", density=0.3, r=8)
    two = gw.combine(model, "two", {"a": 0.5, "b": 0.5}, "ties", density=0.3, r=8)
    assert one.adapter.metadata["composed"] == two.adapter.metadata["composed"]
    for key in keys(model, "a"):
        assert torch.equal(change(model, "one", key), change(model, "two", key))


def test_of_a_stack_the_last_head_counts() -> None:
    model = bert()
    for seed, name in enumerate(("de", "ner", "cls")):
        adapter = gw.graft(model, gw.LoRA(r=2), name, head=True)
        generator = torch.Generator().manual_seed(seed)
        for p in adapter.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
        adapter.labels = (f"{name}-no", f"{name}-yes")
    gw.activate(model, "de >> ner")
    with torch.no_grad():
        out = model(ids()).logits
    made = gw.combine(model, "made", "de >> ner")
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, out, atol=1e-5, rtol=1e-4)
    assert made.adapter.labels == ("ner-no", "ner-yes")
    with pytest.raises(GraftError, match="heads for different labels"):
        gw.combine(model, "other", "0.5*(de >> ner) + 0.5*cls")
    kept = gw.combine(model, "other", "0.5*(de >> ner) + 0.5*cls", head="de >> ner")
    assert kept.adapter.labels == ("ner-no", "ner-yes")
    with pytest.raises(GraftError, match="a sum inside of a stack, where full of 'de' does more than add"):
        gw.combine(model, "sums", "(0.5*de + 0.5*ner) >> cls")


@pytest.mark.parametrize(
    ("e", "said"),
    [
        ("a >> missing", "the adapter 'missing'"),
        ("a >> soft", "changes activations, not a weight"),
        ("0.5*a + 0.5*soft", "compose --recipe"),
        ("(a + soft) >> b", "bottleneck of 'soft' does more than add"),
        ("(a + dora) >> b", "dora of 'dora' does more than add"),
        ("a >> a", "stands twice"),
        ("(a + b) >> b", "stands twice"),
        ("a - a", "adds up to nothing"),
        ("0*a", "adds up to nothing"),
        ("a | b", "no one change of each weight"),
        ("rows(a, none)", "no one change of each weight"),
        ('drop(a, layers="7")', "layers '7'"),
        ("a +", "expected the name of an adapter"),
        ("", "expected the name of an adapter"),
    ],
)
def test_refusals_change_nothing(e: str, said: str) -> None:
    model = library()
    gw.activate(model, "b")
    before, looked = weights_of(model), look(model)
    with pytest.raises(GraftError, match=said.replace("(", r"\(")) as caught:
        gw.combine(model, "made", e)
    assert caught.value.do
    assert look(model) == looked
    assert all(torch.equal(before[n], p) for n, p in weights_of(model).items())


def test_what_was_learnt_is_alike_whatever_the_seed() -> None:
    model = bert()
    for seed, name in enumerate("ab"):
        made = gw.graft(model, gw.LoRA(r=2), name, head=False)
        made.metadata = {
            "task": {"task": "classification", "labels": ["x", "y"], "seed": seed},
            "backbone": "m",
            "training": seed,
        }
    kept = gw.combine(model, "c", "0.5*a + 0.5*b").adapter.metadata
    assert kept["task"]["labels"] == ["x", "y"] and kept["backbone"] == "m" and "training" not in kept
    gw.adapters(model)["b"].metadata["task"]["labels"] = ["y", "x"]
    assert "task" not in gw.combine(model, "d", "0.5*a + 0.5*b").adapter.metadata
