"""The size that is solved is the largest one within the budget, by the closed count and by what is really trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import graftwork.bench.chosen  # noqa: F401  (registers all methods)
from graftwork.bench.budget import allowed, share, solve
from graftwork.core.errors import GraftError
from graftwork.core.method import PRESETS, REGISTRY, flatten, get
from graftwork.core.text import parse_methods
from graftwork.grafting.graft import graft
from graftwork.grafting.install import body_of

OWN = [
    name for name, made in {**REGISTRY, **PRESETS}.items() if made.__module__.startswith("graftwork.")
]  # tests register more
# what is pruned only when training shows it gradients is larger until then
PRUNED = {"sparse", "sparse_adapter"}


@pytest.fixture(scope="module")
def model(bert: Path) -> nn.Module:
    return fresh(bert)


def fresh(bert: Path) -> nn.Module:
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(bert)
        return transformers.AutoModelForSequenceClassification.from_config(config)


def buildable(bert: Path, methods) -> None:
    graft(fresh(bert), list(methods), "tried", seed=0)


def solved(model: nn.Module, text: str, budget: int):
    return solve(parse_methods(text), body_of(model).anatomy, budget)


def beside_the_head(adapter) -> int:
    heads = [p for p in adapter.parts if p.method.replaces and {s.role for s in p.sites} <= {"head", "pooler"}]
    return adapter.num_parameters - sum(p.num_parameters for p in heads)


@pytest.mark.parametrize("budget", [256, 1000, 1023, 1024, 5000])
def test_loras_rank_is_the_quotient(model: nn.Module, budget: int) -> None:
    # two layers, q and v, 32 in and 32 out: 256 parameters for each rank
    found = solved(model, "lora", budget)
    assert found.count == 256 * (budget // 256)
    assert str(found) == f"lora(r={budget // 256})" or budget // 256 == 8


@pytest.mark.parametrize(
    "text", ["lora(r=50)", "bottleneck", "prefix", "hra", "vera", "subspace", "loretta_adp", "dora"]
)
def test_one_more_would_not_fit(model: nn.Module, text: str) -> None:
    [method] = solved(model, text, 3000).methods
    name = next(
        f
        for f in ("tt_rank", "d", "r", "length", "k")
        if f in method.sized_by or (not method.sized_by and hasattr(method, f))
    )
    value = getattr(method, name)
    sites = [*sites_of(model, method)]
    larger = type(method)(**{name: value + 1})
    assert sum(map(method.count, sites)) + method.count_shared(sites) <= 3000
    assert sum(map(larger.count, sites)) + larger.count_shared(sites) > 3000


def sites_of(model: nn.Module, method):
    from graftwork.sites.where import select

    return select(body_of(model).anatomy, method.at, method.layers)


@pytest.mark.parametrize("name", sorted(OWN))
def test_what_is_trained_is_what_was_counted(bert: Path, model: nn.Module, name: str) -> None:
    made = flatten(get(name)())
    if any(m.mixes for m in made):
        pytest.skip("it mixes other adapters")

    try:
        found = solve(made, body_of(model).anatomy, 4000, partial(buildable, bert))
    except GraftError as error:
        if "its smallest setting has" in error.found:  # the others cannot be built on this model at all
            assert int(error.found.rpartition(" ")[2].replace(",", "")) > 4000
        return
    assert found.count <= 4000
    if name not in PRUNED:
        assert beside_the_head(graft(fresh(bert), list(found.methods), "it", seed=0)) == found.count


def test_a_list_shares_the_budget(model: nn.Module) -> None:
    prefix, parallel = solved(model, "prefix(length=30) + parallel(d=60)", 4000).methods
    assert 0.45 < prefix.length / parallel.d < 0.55  # in the proportion in which they were given
    assert 3000 < solved(model, "prefix(length=30) + parallel(d=60)", 4000).count <= 4000


def test_numbers_that_bound_each_other_go_together(model: nn.Module) -> None:
    [found] = solved(model, "adalora(init_r=12, target_r=8)", 5000).methods
    assert 1 <= found.target_r <= found.init_r < 12


def test_a_block_divides_the_width(bert: Path, model: nn.Module) -> None:
    # 128 parameters for each number in a block, beside the scales: 10 would fit, and does not divide 32
    [found] = solve(parse_methods("boft"), body_of(model).anatomy, 1500, partial(buildable, bert)).methods
    assert found.block_size == 8


def test_a_method_without_a_size_stays_as_it_is(model: nn.Module) -> None:
    assert str(solved(model, "ia3", 10_000)) == "ia3()"


def test_what_cannot_be_counted_on_a_backbone_says_why(model: nn.Module) -> None:
    with pytest.raises(GraftError, match=r"leave out 4 blocks(.|\n)*2 that may be: 0, 1"):
        solved(model, "das", 5000)


def test_too_small_a_budget_is_an_error_with_the_smallest_count(model: nn.Module) -> None:
    with pytest.raises(
        GraftError, match=r"lora\(.*within 100 parameters(.|\n)*smallest setting has 256(.|\n)*at least 256"
    ):
        solved(model, "lora", 100)
    with pytest.raises(GraftError, match="smallest setting has"):
        solved(model, "ia3", 10)


def test_without_a_budget_the_text_stands(model: nn.Module) -> None:
    found = solve(parse_methods("lora(r=3)"), body_of(model).anatomy, None)
    assert (str(found), found.count) == ("lora(r=3)", 3 * 256)


def test_budgets_as_text() -> None:
    assert share("0.5%") == 0.005 and share("100_000") == 100_000 and share("1e5") == 100_000 and share("none") is None
    assert allowed("0.5%", 22_713_986) == 113_569 and allowed("700", 10**6) == 700
    for wrong in ("", "-1", "0", "0%", "101%", "nan", "inf", "many"):
        with pytest.raises(GraftError, match="budget"):
            share(wrong)
