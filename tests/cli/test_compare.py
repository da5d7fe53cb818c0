"""graftwork compare: a row for each adapter and expression, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from commands import run
from PIL import Image
from transformers import AutoModelForSequenceClassification

import graftwork as gw
from graftwork.cli import main


@pytest.fixture(scope="module")
def place(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of one task, one of another task, one of another backbone, a linear probe, and a recipe."""
    folder = tmp_path_factory.mktemp("compare")
    tiny.write_csv(folder / "rows.csv", tiny.feelings(200))
    tiny.write_csv(folder / "test.tsv", tiny.feelings(60, seed=1), "\t")
    other = tiny.backbone("bert", folder / "other", type_vocab_size=3)
    numbers = [{"text": row["text"], "label": str(i / 7)} for i, row in enumerate(tiny.feelings(60))]
    tiny.write_csv(folder / "numbers.csv", numbers)
    for name, method, backbone, rows in (
        ("a", "lora(r=4, at='linear')", bert, "rows"),
        ("b", "lora(r=2, at='linear')", bert, "rows"),
        ("soft", "bottleneck(d=4)", bert, "rows"),
        ("probe", "full(at='head, pooler')", bert, "rows"),
        ("number", "lora(r=2)", bert, "numbers"),
        ("wide", "lora(r=2)", other, "rows"),
    ):
        given = ["--backbone", str(backbone), "--data", str(folder / f"{rows}.csv"), "--method", method]
        out = str(folder / name)
        assert main(["train", *given, "--epochs", "3", "--lr", "5e-3", "--seed", str(len(name)), "--out", out]) == 0
    e = f"0.5*{folder}/a + 0.5*{folder}/soft"
    assert main(["compose", e, "--recipe", "--out", str(folder / "both")]) == 0
    return folder


def evaluated(capsys, place: Path, *arguments: str) -> dict[str, float]:
    code, out, err = run(capsys, "eval", *arguments, "--data", str(place / "test.tsv"), "--json")
    assert code == 0, err
    return {k: v for k, v in json.loads(out).items() if k != "rows"}


def test_rows_are_what_eval_show_and_similarity_say(place: Path, bert: Path, capsys, tmp_path: Path) -> None:
    given = [f"{place}/a", f"{place}/soft", f"{place}/both", "0.5*a + 0.5*b", "b >> soft", "2*a"]
    picture = tmp_path / "p.png"
    asked = [*given, "--with", f"{place}/b", "--data", f"{place}/test.tsv", "--picture", str(picture), "--json"]
    code, out, err = run(capsys, "compare", *asked)
    assert code == 0, err
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert list(rows) == ["a", "soft", "both", *given[3:]]
    with_all = [f"{place}/a", "--with", f"{place}/b", "--with", f"{place}/soft", "--adapter"]
    for name, arguments in (
        ("a", [f"{place}/a"]),
        ("soft", [f"{place}/soft"]),
        ("both", [f"{place}/both"]),
        *((e, [*with_all, e]) for e in given[3:]),
    ):
        assert rows[name]["scores"] == evaluated(capsys, place, *arguments)
    sizes = {n: json.loads((place / n / "adapter.json").read_text())["parameters"] for n in ("a", "b", "soft")}
    assert rows["a"]["parameters"] == rows["2*a"]["parameters"] == sizes["a"]
    assert rows["both"]["parameters"] == sizes["a"] + sizes["soft"]
    assert rows["0.5*a + 0.5*b"]["parameters"] == sizes["a"] + sizes["b"]
    assert rows["a"]["bytes"] == sum(f.stat().st_size for f in (place / "a").iterdir())
    assert rows["both"]["bytes"] == sum(f.stat().st_size for f in (place / "both").rglob("*") if f.is_file())
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    gw.load(model, place / "a", "a")
    gw.load(model, place / "b", "b")
    gw.combine(model, "sum", "0.5*a + 0.5*b")
    assert rows["a"]["cosine"] == pytest.approx(1) and rows["2*a"]["cosine"] == pytest.approx(1)
    assert rows["0.5*a + 0.5*b"]["cosine"] == pytest.approx(gw.similarity(model, "a", "sum").cosine, abs=1e-5)
    assert rows["soft"]["cosine"] is rows["both"]["cosine"] is rows["b >> soft"]["cosine"] is None
    assert rows["a"]["agreement"] == 1
    assert all(0 <= row["agreement"] <= 1 and row["seconds"] > 0 and row["rows"] == 60 for row in rows.values())
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_the_share_of_same_answers(place: Path, capsys) -> None:
    """As counted from predictions."""
    texts = [row["text"] for row in tiny.feelings(60, seed=1)]
    labels = []
    for name in ("a", "soft"):
        code, out, _ = run(capsys, "predict", f"{place}/{name}", *texts)
        assert code == 0
        labels.append([json.loads(line)["label"] for line in out.splitlines()])
    code, out, _ = run(capsys, "compare", f"{place}/a", f"{place}/soft", "--data", f"{place}/test.tsv", "--json")
    same = sum(x == y for x, y in zip(*labels, strict=True)) / len(texts)
    assert json.loads(out.splitlines()[1])["agreement"] == pytest.approx(same)


def test_the_table(place: Path, capsys) -> None:
    code, out, _ = run(capsys, "compare", f"{place}/a", f"{place}/b", "--data", f"{place}/test.tsv")
    assert code == 0
    assert all(word in out for word in ("accuracy", "parameters", "cosine", "agrees"))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["{p}/a"], "fewer than two"),
        (["{p}/a", "{p}/a"], "one of them twice"),
        (["{p}/a", "{p}/number"], "is for regression"),
        (["{p}/a", "{p}/wide"], "another structure"),
        (["{p}/a", "{p}/probe"], "nothing but a head"),
        (["{p}/probe", "{p}/a"], "nothing but a head"),
        (["{p}/a", "{p}/nowhere"], "no such folder"),
        (["{p}/a", "a + c"], "the adapter 'c' of 'a + c'"),
        (["{p}/a", "a +"], "expected the name of an adapter"),
        (["{p}/a", "a | b", "--with", "{p}/b"], "one for each row or output"),
        (["a + b", "b"], "give the folders of adapters"),
        (["{p}/a", "{p}/deep/a"], "no such folder"),
        (["{p}/a", "{p}/b", "--picture", "{p}/x.txt"], "the ending '.txt'"),
        (["{p}/a", "{p}/b", "--picture", "{p}/no/x.png"], "no such folder"),
        (["{p}/a", "{p}/b", "--label", "mood"], "mood"),
    ],
)
def test_refused(place: Path, capsys, given: list[str], text: str) -> None:
    code, out, err = run(capsys, "compare", *(word.format(p=place) for word in given), "--data", f"{place}/test.tsv")
    assert code == 2 and text in err and "do:" in err
    assert not out


def test_without_a_task(place: Path, bert: Path, capsys, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    gw.graft(model, gw.LoRA(r=2), "bare")
    gw.save(model, "bare", tmp_path / "bare")
    code, _, err = run(capsys, "compare", f"{place}/a", f"{tmp_path}/bare", "--data", f"{place}/test.tsv")
    assert code == 2 and "no task in adapter.json" in err
