"""A folder with an expression and its adapters, used as one adapter by every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from commands import run

from graftwork.cli import main


@pytest.fixture(scope="module")
def place(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trained adapters of different methods and a recipe of two."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny.write_csv(folder / "rows.csv", tiny.feelings(200))
    tiny.write_csv(folder / "test.tsv", tiny.feelings(60, seed=1), "\t")
    for name, method in (("a", "lora(r=4, at='linear')"), ("soft", "bottleneck(d=4)"), ("b", "ia3")):
        given = ["--backbone", str(bert), "--data", str(folder / "rows.csv"), "--method", method, "--epochs", "4"]
        assert main(["train", *given, "--lr", "5e-3", "--seed", str(len(name)), "--out", str(folder / name)]) == 0
    e = f"0.6*{folder}/a + 0.4*{folder}/soft"
    assert main(["compose", e, "--recipe", "--out", str(folder / "both")]) == 0
    return folder


def scores(capsys, place: Path, *arguments: str) -> dict[str, float]:
    code, out, err = run(capsys, "eval", *arguments, "--data", str(place / "test.tsv"), "--json")
    assert code == 0, err
    return json.loads(out)


def test_what_is_written(place: Path, capsys, tmp_path: Path) -> None:
    assert json.loads((place / "both" / "adapter.json").read_text())["expression"] == "0.6*a + 0.4*soft"
    inside = place / "both" / "soft"
    assert json.loads((inside / "adapter.json").read_text())["name"] == "soft"  # and not the path it came from
    assert "\n# soft\n" in (inside / "README.md").read_text()
    given = [f"{place}/soft >> {place}/b", "--recipe", "--out", str(tmp_path / "r"), "--json"]
    code, out, _ = run(capsys, "compose", *given)
    assert code == 0
    assert json.loads(out)["expression"] == f"{place}/soft >> {place}/b"
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["README.md", "adapter.json", "b", "soft"]


def test_eval_predict_and_show(place: Path, capsys) -> None:
    together = scores(capsys, place, f"{place}/a", "--with", f"{place}/soft", "--adapter", "0.6*a + 0.4*soft")
    assert scores(capsys, place, f"{place}/both") == together
    assert together["loss"] not in [scores(capsys, place, f"{place}/{name}")["loss"] for name in ("a", "soft")]
    code, out, _ = run(capsys, "predict", f"{place}/both", "a witty movie")
    assert code == 0 and json.loads(out)["label"] in ("positive", "negative")
    code, out, _ = run(capsys, "show", f"{place}/both")
    assert code == 0 and "0.6*a + 0.4*soft" in out and "bottleneck" in out and "lora" in out
    code, out, _ = run(capsys, "show", f"{place}/both", "--json")
    assert json.loads(out)["format"] == 2


def test_it_stands_in_expressions(place: Path, capsys, tmp_path: Path) -> None:
    """A recipe among others has its expression's place; so it has in another recipe."""
    given = ["--with", f"{place}/b", "--adapter"]
    one = scores(capsys, place, f"{place}/both", *given, "both >> b")
    more = [f"{place}/a", "--with", f"{place}/soft", *given]
    assert one == scores(capsys, place, *more, "(0.6*a + 0.4*soft) >> b")
    code, _, err = run(capsys, "compose", f"{place}/both >> {place}/b", "--recipe", "--out", str(tmp_path / "r"))
    assert code == 0, err
    assert json.loads((tmp_path / "r" / "adapter.json").read_text())["expression"] == "(0.6*a + 0.4*soft) >> b"
    assert scores(capsys, place, str(tmp_path / "r")) == one


def test_merge_compose_and_convert(place: Path, capsys, tmp_path: Path) -> None:
    code, _, err = run(capsys, "merge", f"{place}/both", "--out", str(tmp_path / "m"))
    assert code == 2 and "bottleneck" in err and "changes activations" in err
    run(capsys, "compose", f"{place}/a >> {place}/b", "--recipe", "--out", str(tmp_path / "weights"))
    wanted = scores(capsys, place, str(tmp_path / "weights"))["loss"]
    code, _, err = run(capsys, "merge", str(tmp_path / "weights"), "--out", str(tmp_path / "merged"))
    assert code == 0 and (tmp_path / "merged" / "config.json").is_file(), err
    for name, given in (
        ("c", ("compose", str(tmp_path / "weights"), "--how", "svd", "--rank", "64")),
        ("d", ("convert", str(tmp_path / "weights"), "--to", "lora(r=64)")),
    ):
        code, _, err = run(capsys, *given, "--out", str(tmp_path / name))
        assert code == 0, err
        assert scores(capsys, place, str(tmp_path / name))["loss"] == pytest.approx(wanted, abs=1e-4)


def test_check(place: Path, bert: Path, capsys, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "check", f"{place}/both", "--json")
    told = json.loads(out)
    assert code == 0 and told["loads"] is None
    assert told["notes"][0] == "a recipe: 0.6*a + 0.4*soft"
    sizes = [json.loads((place / n / "adapter.json").read_text())["parameters"] for n in ("a", "soft")]
    assert told["parameters"] == sum(sizes)
    code, out, _ = run(capsys, "check", f"{place}/both", "--backbone", str(bert), "--json")
    assert code == 0 and json.loads(out)["loads"] is True
    shutil.copytree(place / "both", tmp_path / "r")
    tensors = tmp_path / "r" / "soft" / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    code, out, _ = run(capsys, "check", str(tmp_path / "r"), "--json")
    told = json.loads(out)
    assert code == 1 and told["loads"] is False
    assert all(problem.startswith("soft: ") for problem in told["problems"])


@pytest.mark.parametrize(
    ("expression", "options", "text"),
    [
        ("{p}/a >> {p}/a", (), "twice"),
        ("{p}/a | {p}/b", (), "one for each row or output"),
        ("{p}/a + {p}/nowhere", (), "nowhere"),
        ("{p}/a", (), "one adapter"),
        ("{p}/a + {p}/b", ("--rank", "3"), "no effect"),
        ("{p}/a + {p}/b", ("--how", "svd"), "no effect"),
        ("{p}/a + {p}/b", ("--head", "a"), "no effect"),
    ],
)
def test_refused(place: Path, capsys, tmp_path: Path, expression: str, options, text: str) -> None:
    given = ["compose", expression.format(p=place), "--recipe", "--out", str(tmp_path / "r"), *options]
    code, _, err = run(capsys, *given)
    assert code == 2 and text in err and "do:" in err
    assert not (tmp_path / "r").exists()


def test_what_takes_one_adapter_says_so(place: Path, capsys, tmp_path: Path) -> None:
    code, _, err = run(capsys, "export", f"{place}/both", "--format", "peft", "--out", str(tmp_path / "peft"))
    assert code == 2 and "a recipe of several adapters, 0.6*a + 0.4*soft" in err
    code, _, err = run(capsys, "import", f"{place}/both", "--out", str(tmp_path / "own"))
    assert code == 2 and "a recipe of several adapters" in err and not list(tmp_path.iterdir())
    code, out, _ = run(capsys, "similar", f"{place}/a", str(place), "--json")
    assert code == 0 and {json.loads(line)["name"] for line in out.splitlines()} == {"soft", "b"}
