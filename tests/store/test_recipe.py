"""Recipes: an expression with its adapters in one folder. What is written, what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graftwork as gw
from graftwork.store.recipe import recipe_in

from .files import bert, disk, logits, look, rewrite, trained


def library(**names: Any) -> nn.Module:
    """A model with a LoRA, a bottleneck and a prefix, or with LoRAs of these names."""
    model = bert()
    methods = {"a": gw.LoRA(r=3), "soft": gw.Bottleneck(d=4), "front": gw.Prefix(length=2)}
    for seed, (name, method) in enumerate((names or methods).items()):
        trained(model, name, method, seed=seed)
    return model


def kept(folder: Path, e: Any = "0.5*a + soft >> front") -> tuple[nn.Module, Path]:
    model = library()
    gw.activate(model, e)
    return model, gw.save(model, e, folder / "r")


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """The logits of every branch."""
    ids = torch.randint(5, 48, (3, 7), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        out = model(input_ids=ids)
    return [one.logits for one in (out.values() if gw.active(model) == "a | soft" else [out])]


EXPRESSIONS = ["0.5*a + 0.25*soft", "front >> soft >> a", 'drop(a, layers="0") - soft', "mean(a, front)", "-a", "2*a"]


@pytest.mark.parametrize("e", [*EXPRESSIONS, "rows(a, none, soft >> a)", "a | soft", gw.A("a") - gw.A("soft")])
def test_there_and_back(e: Any, tmp_path: Path) -> None:
    model, folder = kept(tmp_path, e)
    other = bert()
    out, mine = outputs(model), gw.load(other, folder)
    assert gw.active(other) == gw.active(model) == str(e)
    assert set(gw.adapters(other)) == set(gw.parse(str(e)).names())
    assert mine is gw.adapters(other)[gw.parse(str(e)).names()[-1]]
    assert all(torch.equal(x, y) for x, y in zip(out, outputs(other), strict=True))
    for name in gw.parse(str(e)).names():
        there, here = gw.adapters(model)[name].state_dict(), gw.adapters(other)[name].state_dict()
        assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there)


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    _, folder = kept(tmp_path, "0.5*a + soft")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "a", "adapter.json", "soft"]
    data = json.loads((folder / "adapter.json").read_text())
    assert data["format"] == 2 and data["expression"] == "0.5*a + soft"
    assert "| soft |" in (folder / "README.md").read_text()
    alone = bert()
    gw.load(alone, folder / "soft")  # each is an adapter as any other
    assert list(gw.adapters(alone)) == ["soft"]


def test_a_name_stands_in_front(tmp_path: Path) -> None:
    """Two copies on one model; saved again, they have their plain names."""
    model, folder = kept(tmp_path, "0.5*a + soft")
    out = logits(model)
    other = bert()
    gw.load(other, folder)
    gw.load(other, folder, "x", trainable=True)
    assert gw.active(other) == "0.5*x/a + x/soft"
    assert torch.equal(logits(other), out)
    assert all(p.requires_grad for p in gw.adapters(other)["x/a"].parameters())
    gw.save(other, gw.active(other), tmp_path / "again")
    assert recipe_in(tmp_path / "again").expression == gw.parse("0.5*a + soft")
    third = bert()
    gw.load(third, tmp_path / "again")
    assert torch.equal(logits(third), out)


def test_an_active_name_is_one_adapter(tmp_path: Path) -> None:
    model = library()
    gw.activate(model, "a")
    gw.save(model, gw.active(model), tmp_path / "one")
    assert (tmp_path / "one" / "adapter.safetensors").is_file()
    trained(model, "my a + b", gw.LoRA(r=2))  # a name, although it would parse
    gw.save(model, "my a + b", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "adapter.json").read_text())["name"] == "my a + b"


def test_resume_keeps_what_training_needs(tmp_path: Path) -> None:
    model = bert()
    for name in ("p", "q"):
        trained(model, name, "prefix_tuning(length=2)")
    gw.save(model, "p >> q", tmp_path / "whole", resume=True)
    gw.save(model, "p >> q", tmp_path / "folded")
    for folder, resume in (("whole", True), ("folded", False)):
        assert json.loads((tmp_path / folder / "p" / "adapter.json").read_text())["resume"] is resume


# --- refused ----------------------------------------------------------------------------------------------------------


def refused(folder: Path, *words: str, onto: nn.Module | None = None) -> None:
    """gw.load is a GraftError with these words; neither a bare nor a grafted model nor the disk changes."""
    models = [bert(), library(other=gw.LoRA(r=2))] if onto is None else [onto]
    files = disk(folder)
    for model in models:
        before, out = look(model), logits(model)
        with pytest.raises(gw.GraftError) as error:
            gw.load(model, folder)
        for word in words:
            assert word in str(error.value), error.value
        assert error.value.do
        assert look(model) == before and torch.equal(logits(model), out)
    assert disk(folder) == files


HOSTILE = [
    "../x",
    "/etc",
    "a/b",
    "",
    "..",
    ".",
    "a\\b",
    "a/../../x",
    "~",
    "a\0b",
    "adapter.json",
    "C:",
    ".hidden",
    " a",
    "a.",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name(name: str, tmp_path: Path) -> None:
    """Refused by what it says, although there is an adapter where it points."""
    _, folder = kept(tmp_path, "0.5*a + soft")
    if name in ("../x", "a/../../x"):
        shutil.copytree(folder / "a", tmp_path / "x")
    if name == "a/b":
        shutil.copytree(folder / "soft", folder / "a" / "b")
    rewrite(folder, lambda d: d.update(expression=f"soft >> {json.dumps(name)}"))
    refused(folder, "no folder in it")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=30)
    | st.lists(st.sampled_from([*HOSTILE, "a", "soft"])).map(lambda n: " >> ".join(map(json.dumps, n)))
)
def test_any_expression_is_whole_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    _, place = kept(folder, "a >> soft")
    rewrite(place, lambda d: d.update(expression=text))
    model = bert()
    before = look(model)
    try:
        gw.load(model, place)
    except gw.GraftError:
        assert look(model) == before
    else:
        assert set(gw.adapters(model)) <= {"a", "soft"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(expression=None), "damaged: no expression"),
        (lambda d: d.update(expression=["a"]), "damaged: no expression"),
        (lambda d: {k: v for k, v in d.items() if k != "expression"}, "damaged: no expression"),
        (lambda d: d.update(expression="0.5*"), "damaged: the expression"),
        (lambda d: d.update(expression="(" * 100000 + "a"), "damaged"),
        (lambda d: d.update(expression="rows(none)"), "no adapter"),
        (lambda d: d.update(expression="a >> other"), "no folder 'other' in it"),
        (lambda d: d.update(expression="a >> a"), "twice"),
        (lambda d: d.update(expression='drop(a, layers="9")'), "layers '9'"),
        (lambda d: d.update(format=3), "newer graftwork"),
        (lambda d: d.update(format="2"), "no format version"),
        (lambda d: d.update(format=1), "damaged"),
        (lambda d: [d], "no format version"),
    ],
)
def test_a_damaged_recipe(change: Any, said: str, tmp_path: Path) -> None:
    _, folder = kept(tmp_path, "a >> soft")
    rewrite(folder, change)
    refused(folder, said)


def test_all_or_nothing(tmp_path: Path) -> None:
    """The last of three is damaged: the first two do not stay."""
    _, folder = kept(tmp_path, "a >> soft >> front")
    tensors = folder / "front" / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    refused(folder)
    shutil.rmtree(folder / "front")
    refused(folder, "no folder 'front' in it")
    (folder / "front").mkdir()
    refused(folder, "no adapter.json")


def test_a_member_is_one_adapter_inside(tmp_path: Path) -> None:
    _, folder = kept(tmp_path, "a >> soft")
    shutil.rmtree(folder / "soft")
    kept(tmp_path / "deep", "a >> front")[1].rename(folder / "soft")
    refused(folder, "a recipe, a >> front, and not one adapter")
    shutil.rmtree(folder / "soft")
    kept(tmp_path / "out", "a >> soft")
    (folder / "soft").symlink_to(tmp_path / "out" / "r" / "soft")
    refused(folder, "no folder 'soft' in it")


def test_another_backbone_and_names_that_are_taken(tmp_path: Path) -> None:
    _, folder = kept(tmp_path, "a >> soft")
    refused(folder, "load the backbone", onto=bert(hidden=32))
    refused(folder, "'soft'", "the model has one", onto=library(soft=gw.LoRA(r=2)))


@pytest.mark.parametrize(
    ("e", "given", "said"),
    [
        ("a >> missing", {}, "the adapter 'missing'"),
        ("missing", {}, "the adapter 'missing'"),
        ("a >>", {}, "expected the name"),
        (None, {}, "an expression over adapters"),
        ("a >> soft", {"format": "peft"}, "gw.combine"),
        ("a >> soft", {"as_lora": True, "format": "peft"}, "gw.combine"),
        ("a >> soft", {"rank": 3}, "as_lora is not set"),
        ('a >> ".."', {}, "'..'"),
        ('a >> "x/"', {}, "'x/'"),
        ('a >> "x/a"', {}, "names that are alike"),
        ("a >> A", {}, "names that are alike"),
    ],
)
def test_saving_is_refused_and_writes_nothing(e: Any, given: Any, said: str, tmp_path: Path) -> None:
    model = library()
    for name in ("..", "x/", "x/a", "A"):
        trained(model, name, gw.LoRA(r=1))
    before = look(model)
    with pytest.raises(gw.GraftError) as error:
        gw.save(model, e, tmp_path / "r", **given)
    assert said in str(error.value) and error.value.do
    assert look(model) == before
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over_or_left_behind(tmp_path: Path) -> None:
    model, folder = kept(tmp_path, "a >> soft")
    files = disk(tmp_path)
    with pytest.raises(gw.GraftError, match="something is there"):
        gw.save(model, "a >> front", folder)
    with torch.no_grad():
        next(gw.adapters(model)["soft"].parameters()).fill_(float("nan"))
    with pytest.raises(gw.GraftError, match="not finite"):
        gw.save(model, "a >> soft", tmp_path / "other")
    assert disk(tmp_path) == files
