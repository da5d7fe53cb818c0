"""The gallery in docs/methods is the one the code gives: `graftwork methods --gallery docs/methods` writes it anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import graftwork as gw
from graftwork.cli import main
from graftwork.cli.gallery import Backbone, pages
from graftwork.core.method import PRESETS, REGISTRY, flatten, get

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "methods"


def own() -> list[str]:
    """What the package itself registers: tests and examples register methods of their own."""
    gw.methods()
    return sorted(name for name, made in {**REGISTRY, **PRESETS}.items() if made.__module__.startswith("graftwork."))


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages(own())


def test_the_gallery_is_up_to_date(made: dict[str, str]) -> None:
    there = {f.name: f.read_text(encoding="utf-8") for f in FOLDER.glob("*.md")}
    assert there.keys() == made.keys(), "run: graftwork methods --gallery docs/methods"
    changed = [name for name, text in made.items() if there[name] != text]
    assert not changed, f"{changed}: run: graftwork methods --gallery docs/methods"


def test_every_page_says_when_to_choose_it_and_where_it_is_from(made: dict[str, str]) -> None:
    for name in own():
        text = made[f"{name}.md"]
        for heading in ("**When to choose it:** ", "**Parameters:** ", "**Source:** "):
            assert text.split(heading)[1].split("\n")[0].strip(), f"{name}: nothing under {heading}"


def test_the_counts_are_those_of_grafted_models() -> None:
    model = BertModel(BertConfig(hidden_size=24, num_attention_heads=2, intermediate_size=48, num_hidden_layers=2))
    backbone = Backbone(model)
    for name in ("lora", "bitfit", "mam", "prefix"):
        adapter = gw.graft(model, name, "a")
        assert backbone.counted(flatten(get(name)())).startswith(f"{adapter.num_parameters:,} |"), name
        gw.remove(model, "a")


def test_the_command_writes_pages_and_removes_those_of_methods_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "gone.md").write_text("old")
    assert main(["methods", "ether*", "--gallery", str(tmp_path)]) == 0
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "ether.md", "ether_plus.md"}
