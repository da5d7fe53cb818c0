"""The commands that make an adapter out of others: compose, extract, convert, similar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from commands import run
from transformers import AutoModelForSequenceClassification

import graftwork as gw
from graftwork.cli import main


@pytest.fixture(scope="module")
def place(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two LoRAs of unequal rank, a DoRA and two bottlenecks, all trained, and data."""
    folder = tmp_path_factory.mktemp("values")
    tiny.write_csv(folder / "rows.csv", tiny.feelings(200))
    tiny.write_csv(folder / "test.tsv", tiny.feelings(60, seed=1), "\t")
    (folder / "all").mkdir()
    for name, method in (
        ("a", "lora(r=4, at='linear')"),
        ("b", "lora(r=2, alpha=4, at='linear')"),
        ("dora", "dora(r=2, at='linear')"),
        ("soft", "bottleneck(d=4)"),
        ("soft2", "bottleneck(d=4)"),
    ):
        seed = str(len(name))
        given = ["--backbone", str(bert), "--data", str(folder / "rows.csv"), "--method", method, "--epochs", "3"]
        out = str(folder / "all" / name)
        assert main(["train", *given, "--lr", "5e-3", "--seed", seed, "--out", out]) == 0
    return folder


def test_compose_writes_an_adapter_that_is_the_sum(place: Path, bert: Path, capsys, tmp_path: Path) -> None:
    a, b, out = place / "all" / "a", place / "all" / "b", tmp_path / "c"
    code, said, _ = run(capsys, "compose", f"0.5*{a} + 0.5*{b}", "--out", str(out), "--json")
    assert code == 0
    told = json.loads(said)
    assert max(site["error"] for site in told["sites"]) < 1e-5
    assert {site["r"] for site in told["sites"]} == {6}
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
    for name, source in (("a", a), ("b", b), ("c", out)):
        gw.load(model, source, name)
    gw.combine(model, "own", {"a": 0.5, "b": 0.5})
    ids = torch.randint(6, 40, (2, 7))
    with torch.no_grad():
        own = model(ids).logits
        gw.activate(model, "c")
        assert torch.equal(model(ids).logits, own)
    # it knows its task, so that it can be scored and merged like any other
    code, said, _ = run(capsys, "eval", str(out), "--data", str(place / "test.tsv"), "--json")
    assert code == 0
    assert json.loads(said)["accuracy"] > 0.6
    code, said, _ = run(capsys, "show", str(out))
    assert code == 0
    assert "lora(" in said


def test_compose_in_a_table_and_by_other_rules(place: Path, capsys, tmp_path: Path) -> None:
    a, b = place / "all" / "a", place / "all" / "b"
    code, said, _ = run(
        capsys, "compose", f"{a} - 0.5 * {b}", "--out", str(tmp_path / "d"), "--how", "svd", "--rank", "3"
    )
    assert code == 0
    assert "largest error of a site" in said
    assert "rank" in said
    code, _, _ = run(capsys, "compose", f"{a} + {b}", "--out", str(tmp_path / "t"), "--how", "ties", "--density", "0.5")
    assert code == 0
    softs = " + ".join(str(place / "all" / n) for n in ("soft", "soft2"))
    code, said, _ = run(capsys, "compose", softs, "--out", str(tmp_path / "soup"), "--how", "average")
    assert code == 0
    assert (
        json.loads((tmp_path / "soup" / "adapter.json").read_text())["methods"][0]["method"]["method"] == "bottleneck"
    )


@pytest.mark.parametrize(
    ("expression", "options", "text"),
    [
        ("{a} + {dora}", (), "--how svd --rank 16"),
        ("{a} + {soft}", (), "changes activations"),
        ("{a} - {a}", (), "adds up to nothing"),
        ("{a} >> {a}", (), "stands twice"),
        ("{a} | {b}", (), "one for each row or output"),
        ("({a} + {dora}) >> {b}", (), "compose the sum first"),
        ("{a} + missing", (), "missing"),
        ("{a} {b}", (), "expected |, >>, + or -"),
        ("{a} + 0.5*", (), "expected the name of an adapter"),
        ("", (), "expected the name of an adapter"),
        ("{a} + {b}", ("--how", "svd", "--density", "0.5"), "no effect on 'svd'"),
        ("{a} + {b}", ("--how", "average", "--rank", "3"), "no effect on it"),
        ("{a} + {b}", ("--how", "average"), "use gw.combine"),
        ("{a} >> {b}", ("--how", "average"), "no weighted sum of adapters"),
        ("{a} + {b}", ("--how", "ties", "--density", "0"), "above 0, at most 1"),
    ],
)
def test_compose_refuses(place: Path, capsys, tmp_path: Path, expression: str, options, text: str) -> None:
    names = {n: str(place / "all" / n) for n in ("a", "b", "dora", "soft")}
    code, _, err = run(capsys, "compose", expression.format(**names), "--out", str(tmp_path / "c"), *options)
    assert code == 2
    assert text in err
    assert not (tmp_path / "c").exists()


def test_an_output_folder_that_holds_something_is_left_alone(place: Path, bert: Path, capsys) -> None:
    a = str(place / "all" / "a")
    before = (place / "all" / "b" / "adapter.json").read_bytes()
    for command in (
        ("compose", f"{a} + {a}2"),
        ("convert", a, "--to", "lora(r=2)"),
        ("extract", "--base", str(bert), "--tuned", str(bert)),
    ):
        code, _, err = run(capsys, *command, "--out", str(place / "all" / "b"))
        assert code == 2
        assert "something is there" in err
    assert (place / "all" / "b" / "adapter.json").read_bytes() == before


def test_compose_takes_nested_expressions(place: Path, bert: Path, capsys, tmp_path: Path) -> None:
    a, b, dora = (place / "all" / n for n in ("a", "b", "dora"))
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
    for name, source in (("a", a), ("b", b), ("dora", dora)):
        gw.load(model, source, name)
    ids = torch.randint(6, 40, (2, 7))
    for i, (text, e, options) in enumerate(
        (
            ("mean({a}, {b})", "mean(a, b)", ()),
            ("2*({a} - 0.5*{b})", "2*a - b", ()),
            ("{a} >> {b}", "a >> b", ()),
            ("{dora} >> {a}", "dora >> a", ("--method", "svd", "--rank", "64")),
        )
    ):
        given = text.format(a=a, b=f'"{b}"', dora=dora)
        code, said, err = run(capsys, "compose", given, "--out", str(tmp_path / str(i)), "--json", *options)
        assert code == 0, err
        assert max(site["error"] for site in json.loads(said)["sites"]) < 1e-5
        gw.load(model, tmp_path / str(i), str(i))
        with torch.no_grad():
            mine = model(ids).logits
            gw.activate(model, e)
            torch.testing.assert_close(mine, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_compose_points_at_the_character(place: Path, capsys, tmp_path: Path) -> None:
    code, _, err = run(capsys, "compose", "0.5*a ? b", "--out", str(tmp_path / "c"))
    assert code == 2
    line, mark = err.splitlines()[1:3]
    assert line[mark.index("^")] == "?"


def test_convert(place: Path, capsys, tmp_path: Path) -> None:
    dora = str(place / "all" / "dora")
    code, said, _ = run(capsys, "convert", dora, "--to", "lora(r=3)", "--out", str(tmp_path / "plain"), "--json")
    assert code == 0
    errors = [site["error"] for site in json.loads(said)["sites"]]
    assert 0 < max(errors) < 1
    code, said, _ = run(capsys, "convert", dora, "--to", "lora(r=64)", "--out", str(tmp_path / "full"), "--json")
    assert max(site["error"] for site in json.loads(said)["sites"]) < 1e-4
    scores = []
    for folder in (dora, str(tmp_path / "full")):
        code, said, _ = run(capsys, "eval", folder, "--data", str(place / "test.tsv"), "--json")
        assert code == 0
        scores.append(json.loads(said)["loss"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    for method in ("dora(r=2)", "lora(r=2, dropout=0.1)", "lora(r=2) + ia3", "lorra"):
        code, _, err = run(capsys, "convert", dora, "--to", method, "--out", str(tmp_path / "other"))
        assert code == 2
        assert not (tmp_path / "other").exists()
        assert "do:" in err


def test_extract(bert: Path, capsys, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("query.weight"):
                p += 0.1 * torch.randn(p.shape[0], 2, generator=g) @ torch.randn(2, p.shape[1], generator=g)
        model.classifier.weight += 1.0
        model.bert.encoder.layer[0].output.LayerNorm.weight *= 1.5
    model.config.id2label = {0: "bad", 1: "good"}
    model.save_pretrained(tmp_path / "tuned")
    given = ["--base", str(bert), "--tuned", str(tmp_path / "tuned"), "--rank", "4"]
    code, said, _ = run(capsys, "extract", *given, "--out", str(tmp_path / "a"), "--json")
    assert code == 0
    told = json.loads(said)
    assert {site["r"] for site in told["sites"]} == {2}
    assert max(site["error"] for site in told["sites"]) < 1e-5
    assert told["left"]["bert.encoder.layer.0.output.LayerNorm.weight"] == pytest.approx(0.5, rel=1e-4)
    code, said, _ = run(capsys, "extract", *given, "--out", str(tmp_path / "b"), "--rest")
    assert code == 0
    assert "left out" not in said
    again = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
    adapter = gw.load(again, tmp_path / "b")
    assert adapter.labels == ("bad", "good")
    ids = torch.randint(6, 40, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    model.config.num_hidden_layers = 3
    type(model)(model.config).save_pretrained(tmp_path / "deeper")
    code, _, err = run(capsys, "extract", "--base", str(tmp_path / "deeper"), *given[2:], "--out", str(tmp_path / "c"))
    assert code == 2
    assert "the tuned one lacks" in err
    code, _, err = run(capsys, "extract", "--base", str(tmp_path / "no"), *given[2:], "--out", str(tmp_path / "c"))
    assert code == 2


def test_similar(place: Path, bert: Path, capsys, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    gw.load(model, place / "all" / "a", "a")
    gw.load(model, place / "all" / "b", "b")
    gw.scale(model, "opposite", "a", -0.5)
    gw.combine(model, "near", {"a": 1.0, "b": 0.1})
    for name in ("a", "b", "opposite", "near"):
        gw.save(model, name, tmp_path / "all" / name)
    code, said, _ = run(capsys, "similar", str(tmp_path / "all" / "a"), str(tmp_path / "all"), "--json")
    assert code == 0
    found = {row["name"]: row for row in map(json.loads, said.splitlines())}
    assert list(found) == ["near", "b", "opposite"]
    assert found["opposite"]["cosine"] == pytest.approx(-1, abs=1e-6)
    for name, row in found.items():
        assert row["cosine"] == pytest.approx(gw.similarity(model, "a", name).cosine, abs=1e-5)
        assert 0 <= row["text"] <= 1 + 1e-9
    code, said, _ = run(capsys, "similar", str(place / "all" / "soft"), str(place / "all"))
    assert code == 0
    assert "soft2" in said
    code, _, err = run(capsys, "similar", str(place / "all" / "a"), str(place / "nowhere"))
    assert code == 2
    assert "no such folder" in err
