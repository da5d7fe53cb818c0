"""Mixtures inside of other expressions: split by hand, rows, branches, sums and nests of fuse and route."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "systems"))

from adapter_models import bert, ids, llama, spread
from routing_models import members, states

import graftwork as gw
from graftwork.core.errors import GraftError

KINDS = [
    pytest.param(gw.Pfeiffer(d=4), id="bottleneck"),
    pytest.param(gw.LoRA(r=2, at="up, down"), id="lora"),
    pytest.param(gw.IA3(at="down"), id="ia3"),
]


def ready(methods, make=bert, layers: int = 1, names: str = "abc"):
    model = members(make(layers=layers), methods, names)
    spread(gw.graft(model, gw.Fusion(of=list(names[:2])), "f", head=False), 0.1)
    return model


@pytest.mark.parametrize("methods", KINDS)
def test_split_sends_each_token_through_its_own_adapter(methods):
    """In one layer, behind attention, a token's state depends on its own adapter alone."""
    model = ready(methods)
    alone = {name: states(model, name) for name in ("a", "b", None)}
    for text, owners in (
        ("split(a=3, b=-1)", ["a"] * 3 + ["b"] * 4),
        ("split(a=3, b=2)", ["a"] * 3 + ["b"] * 2 + [None] * 2),
        ("split(a=20)", ["a"] * 7),
        ("split(a=-1)", ["a"] * 7),
    ):
        wanted = torch.stack([alone[owner][:, i] for i, owner in enumerate(owners)], 1)
        torch.testing.assert_close(states(model, text), wanted, atol=1e-5, rtol=1e-5)


def test_split_counts_tokens_from_the_first_that_the_mask_shows():
    model = ready(gw.Pfeiffer(d=4))
    x = ids(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    alone = {name: states(model, name, x, attention_mask=mask) for name in "ab"}
    found = states(model, "split(a=2, b=-1)", x, attention_mask=mask)
    for row, first in ((0, 0), (1, 2)):
        torch.testing.assert_close(found[row, first : first + 2], alone["a"][row, first : first + 2])
        torch.testing.assert_close(found[row, first + 2 :], alone["b"][row, first + 2 :])


def test_split_generates_the_same_with_and_without_the_cache():
    model = ready(gw.LoRA(r=2, at="up, down"), llama, layers=2)
    gw.activate(model, "split(a=3, b=-1)")
    x = ids(2, 5)
    mask = torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    cached = model.generate(x, **given, use_cache=True)
    assert torch.equal(cached, model.generate(x, **given, use_cache=False))


@pytest.mark.parametrize("methods", KINDS)
def test_mixtures_stand_in_rows_and_branches(methods):
    model = ready(methods, layers=2)
    x = ids(4)
    each = ["f", None, 'route(a, c, by="uniform")', "split(a=2, b=-1)"]
    together = states(model, gw.rows(each), x)
    for i, e in enumerate(each):
        torch.testing.assert_close(together[i], states(model, e, x)[i], atol=1e-5, rtol=1e-5)
    with torch.no_grad(), gw.using(model, "f | a"):
        both = model(x)
    for e in ("f", "a"):
        with torch.no_grad(), gw.using(model, e):
            torch.testing.assert_close(both[e].logits, model(x).logits)


@pytest.mark.parametrize("methods", KINDS)
def test_mixtures_of_sums_and_of_mixtures(methods):
    """Shares that are the same for every token are sums: what is nested can be written out."""
    model = ready(methods)
    for mixed, plain in (
        ('route(a, b, by="uniform")', "0.5*a + 0.5*b"),
        ('route(a - c, 2*b, by="uniform")', "0.5*a - 0.5*c + b"),
        ('route(route(a, b, by="uniform"), c, by="uniform")', "0.25*a + 0.25*b + 0.5*c"),
        ('0.5*route(a, b, by="uniform") + 0.5*c', "0.25*a + 0.25*b + 0.5*c"),
    ):
        torch.testing.assert_close(states(model, mixed), states(model, plain), atol=1e-5, rtol=1e-5)
    assert (
        str(gw.parse('fuse(a >> c, route(b, c, by="uniform"), by=f)')) == "fuse(a >> c, route(b, c, by=uniform), by=f)"
    )


def test_a_stack_goes_on_behind_a_mixture():
    model = ready(gw.Pfeiffer(d=4))
    (delta,) = gw.adapters(model)["c"].deltas()
    with torch.no_grad():
        z = states(model, "f")
        torch.testing.assert_close(states(model, "f >> c"), z + delta.branch(z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("split(a=0)", "not a number of tokens"),
        ("split(a=-1, b=2)", "-1 stands for all"),
        ("route(a, b, by=nobody)", "nobody"),
        ('route(a, b, by="fusion")', "trains what it mixes by"),
        ('route(a, b, by="lora")', "mixes nothing"),
        ('route(a, b, by="arrow")', "low-rank update"),
        ("fuse(a, c, by=f)", "c is none of those"),
        ("rows(a, b) >> split(a=1)", "stack twice"),
        ("a >> fuse(a, b)", "twice"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(text, found):
    model = ready(gw.Pfeiffer(d=4))
    gw.activate(model, "a")
    out = states(model, "a")
    with pytest.raises(GraftError, match=found):
        gw.activate(model, text)
    assert gw.active(model) == "a" and torch.equal(states(model, "a"), out)
