"""The commands, as a user types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from graftwork.cli import COMMANDS, main


@pytest.fixture(scope="module")
def place(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a trained adapter."""
    folder = tmp_path_factory.mktemp("place")
    tiny.write_csv(folder / "rows.csv", tiny.feelings(400))
    tiny.write_csv(folder / "test.tsv", tiny.feelings(60, seed=1), "\t")
    code = main(
        [
            "train",
            "--backbone",
            str(bert),
            "--data",
            str(folder / "rows.csv"),
            "--method",
            "lora(r=4, at='linear')",
            "--epochs",
            "8",
            "--lr",
            "5e-3",
            "--out",
            str(folder / "sst2"),
        ]
    )
    assert code == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"graftwork {command}" in text and len(text) > 300
    if command == "train":
        for option in (
            "--backbone",
            "--data",
            "--method",
            "--out",
            "--text",
            "--label",
            "--pair",
            "--resume",
            "--trainer",
            "--lr",
        ):
            assert option in text


def test_help_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_the_heavy_libraries_wait() -> None:
    code = (
        "import sys; from graftwork.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_predict(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(place / "sst2"), "a witty movie", "the plot was awful"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == ["positive", "negative"]
    assert rows[0]["input"] == "a witty movie" and rows[0]["score"] > 0.8
    assert main(["predict", str(place / "sst2"), "--batch", "1", "a witty movie", "the plot was awful"]) == 0
    assert [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()] == ["positive", "negative"]

    (place / "texts.txt").write_text("a witty movie\n\nthe plot was awful\n")
    assert (
        main(
            [
                "predict",
                str(place / "sst2"),
                "--file",
                str(place / "texts.txt"),
                "--out",
                str(place / "predictions.jsonl"),
            ]
        )
        == 0
    )
    assert [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()] == rows


def test_eval_gives_what_training_gave(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(place / "sst2"), "--data", str(place / "test.tsv"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["accuracy"] > 0.9 and scores["rows"] == 60
    renamed = [{"sentence": r["text"], "mood": r["label"]} for r in tiny.feelings(60, seed=1)]
    tiny.write_csv(place / "renamed.csv", renamed)
    assert (
        main(
            [
                "eval",
                str(place / "sst2"),
                "--data",
                str(place / "renamed.csv"),
                "--json",
                "--text",
                "sentence",
                "--label",
                "mood",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out) == scores


def test_show(place: Path, bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(place / "sst2")]) == 0
    text = capsys.readouterr().out
    for part in (
        "lora(at=",
        "BertForSequenceClassification",
        "accuracy",
        "learning_rate",
        "negative, positive",
        "classification",
    ):
        assert part in text, part
    assert main(["show", str(place / "sst2"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["backbone"] == str(bert)


def test_an_expression_over_adapters(place: Path, bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, other = str(place / "rows.csv"), place / "other"
    given = [
        "--backbone",
        str(bert),
        "--data",
        rows,
        "--method",
        "bottleneck(d=4)",
        "--epochs",
        "1",
        "--out",
        str(other),
    ]
    assert main(["train", *given]) == 0
    capsys.readouterr()

    def scores(*options: str) -> list[float]:
        assert main(["predict", str(place / "sst2"), "a witty movie", *options]) == 0
        return next(json.loads(line)["scores"] for line in capsys.readouterr().out.splitlines())

    def close(a: object, b: object) -> bool:
        return json.dumps(a) == json.dumps(b)

    alone = scores()
    assert close(scores("--adapter", "sst2"), alone)
    assert close(scores("--with", str(other), "--adapter", "sst2 + 0*other"), alone)
    both = scores("--with", str(other), "--adapter", "0.5*sst2 + 0.5*other")
    assert not close(both, alone) and not close(both, scores("--with", str(other), "--adapter", "other"))
    data = ["--data", str(place / "test.tsv"), "--json", "--with", str(other)]
    assert main(["eval", str(place / "sst2"), *data, "--adapter", "mean(sst2, other)"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 60
    half = ["--adapter", "0.5*sst2", "--out", str(place / "half")]
    assert main(["merge", str(place / "sst2"), *half]) == 0
    capsys.readouterr()
    for options, said in (
        (["--with", str(other)], "no expression"),
        (["--adapter", "sst2 + gone"], "'gone'"),
        (["--adapter", "sst2 +"], "^"),
        (["--adapter", "sst2 | sst2"], "one for each row or output"),
        (["--with", str(place / "sst2"), "--adapter", "sst2"], "of one name"),
    ):
        assert main(["predict", str(place / "sst2"), "a", *options]) == 2
        assert said in capsys.readouterr().err


def test_a_fusion_of_trained_adapters(
    place: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--backbone", str(bert), "--data", str(place / "rows.csv"), "--epochs", "1"]
    members = [str(tmp_path / name) for name in "ab"]
    beside = [option for folder in members for option in ("--with", folder)]
    for seed, folder in enumerate(members):
        method = ["--method", "bottleneck(d=4)", "--seed", str(seed)]
        assert main(["train", *common, *method, "--out", folder]) == 0
    before = [tiny.tree(Path(folder)) for folder in members]
    out, fusion = str(tmp_path / "ab"), "fusion(of=['a', 'b'])"
    assert main(["train", *common, "--method", fusion, *beside, "--out", out]) == 0
    assert [tiny.tree(Path(folder)) for folder in members] == before
    stored = json.loads((tmp_path / "ab" / "adapter.json").read_text())
    assert stored["methods"][0]["method"]["method"] == "fusion"
    assert stored["metadata"]["training"]["with"] == members
    capsys.readouterr()

    def scores(*options: str) -> str:
        assert main(["predict", out, "a witty movie", *options]) == 0
        return json.dumps([json.loads(line)["scores"] for line in capsys.readouterr().out.splitlines()])

    alone = scores(*beside)
    assert scores(*beside, "--adapter", "ab") == alone == scores(*beside, "--adapter", "fuse(a, b)")
    assert scores(*beside, "--adapter", "b") != alone
    assert main(["eval", out, "--data", str(place / "test.tsv"), "--json", *beside]) == 0
    trained = stored["metadata"]["metrics"]["accuracy"]
    assert set(json.loads(capsys.readouterr().out)) == {*stored["metadata"]["metrics"], "rows"} and 0 <= trained <= 1
    assert main(["predict", out, "a witty movie"]) == 2
    assert "the adapter 'a'" in capsys.readouterr().err
    for number, (method, options, said) in enumerate(
        (
            (fusion, [], "the adapter 'a'"),
            (fusion, beside[:2], "the adapter 'b'"),
            ("fusion(of=['a', 'b'], joint=True)", beside, "only the mixture is written"),
            ("lora(r=2)", beside, "does not use a"),
            (fusion, [*beside, "--with", members[0]], "of one name"),
        )
    ):
        assert main(["train", *common, "--method", method, *options, "--out", str(tmp_path / f"no{number}")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / f"no{number}").exists()


def test_merge_writes_a_plain_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(place / "sst2"), "--out", str(place / "merged")]) == 0
    model, report = AutoModelForSequenceClassification.from_pretrained(place / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    words = AutoTokenizer.from_pretrained(place / "merged")
    main(["predict", str(place / "sst2"), "a witty movie"])
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    with torch.no_grad():
        found = model(**words("a witty movie", return_tensors="pt")).logits.softmax(-1)[0]
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert {model.config.id2label[i]: p for i, p in enumerate(found.tolist())} == pytest.approx(expected, abs=1e-5)
    before = tiny.tree(place / "merged")
    assert main(["merge", str(place / "sst2"), "--out", str(place / "merged")]) == 2
    assert tiny.tree(place / "merged") == before


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    assert "lora" in capsys.readouterr().out
    assert main(["methods", "lora"]) == 0
    text = capsys.readouterr().out
    for part in ("W' = W + s B A", "r = 8", "alpha = 16.0", "r (in + out)", "arXiv 2106.09685"):
        assert part in text
    assert main(["methods", "lroa"]) == 2
    assert "did you mean 'lora'" in capsys.readouterr().err


def test_anatomy(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["anatomy", str(bert)]) == 0
    text = capsys.readouterr().out
    assert "BertForMaskedLM" in text and "lm_head" in text
    assert main(["anatomy", str(bert), "--at", "q, v", "--layers", "-1"]) == 0
    text = capsys.readouterr().out
    assert "2 sites" in text and "layer.1.attention.self.query" in text and "layer.0" not in text
    assert main(["anatomy", "gpt2"]) == 0  # a model type
    assert "qkv" in capsys.readouterr().out
    assert main(["anatomy", str(bert), "--at", "qq"]) == 2


BAD = {
    "unknown method": (["--method", "lroa(r=8)"], "did you mean 'lora'"),
    "unknown hyper-parameter": (["--method", "lora(rank=8)"], "no hyper-parameter 'rank'"),
    "wrong type": (["--method", "lora(r='8')"], "a whole number"),
    "out of range": (["--method", "lora(dropout=2)"], r"in \[0, 1\)"),
    "no site": (["--method", "lora(at='cross.q')"], "cross"),
    "broken method": (["--method", "lora(r=8"], "not a method"),
    "no backbone": (["--backbone", "{place}/nowhere"], "no folder of that name"),
    "a folder without a model": (["--backbone", "{place}/images"], "no config.json"),
    "no data": (["--data", "{place}/gone.csv"], "no such file"),
    "an empty file": (["--data", "{place}/empty.csv"], "the file is empty"),
    "no label": (["--data", "{place}/nolabel.csv"], "column with the label"),
    "no such column": (["--label", "lable"], "did you mean 'label'"),
    "one class": (["--data", "{place}/one.csv"], "at least two classes"),
    "unseen labels": (["--eval-data", "{place}/unseen.csv"], "'neutral', unseen in training"),
    "a gap": (["--data", "{place}/gap.csv"], "row 2 has none"),
    "no such argument": (["--trainer", "warmup_stepz=3"], "did you mean 'warmup_steps'"),
    "too small": (["--method", "lora(r=0)"], "a whole number >= 1"),
    "a taken folder": (["--out", "{place}/sst2"], "a finished adapter"),
    "a folder with other things": (["--out", "{place}/images"], "a folder with left"),
    "a file": (["--out", "{place}/rows.csv"], "a file"),
    "a folder that cannot be": (["--out", "/proc/nowhere/out"], "give a folder that can be written"),
    "nothing to be best on": (["--best", "--holdout", "0"], "no rows to evaluate on"),
    "nonsense": (["--batch", "0"], "at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_changes_nothing(
    case: str, place: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, says = BAD[case]
    (place / "empty.csv").write_bytes(b"")
    tiny.write_csv(place / "nolabel.csv", [{"text": "a", "weight": "1"}])
    tiny.write_csv(place / "one.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])
    tiny.write_csv(place / "gap.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": ""}])
    tiny.write_csv(place / "unseen.csv", [{"text": "a", "label": "neutral"}])
    (place / "images" / "left").mkdir(parents=True, exist_ok=True)
    given = {"--backbone": str(bert), "--data": str(place / "rows.csv"), "--out": str(place / "new"), "--steps": "1"}
    for option, value in zip(options, [*options[1:], ""], strict=True):
        if option.startswith("--"):
            given[option] = value.format(place=place)
    before = tiny.tree(place), tiny.tree(bert)
    arguments = [x for k, v in given.items() for x in ((k,) if v.startswith("--") else (k, v))]
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert "Traceback" not in said
    assert (tiny.tree(place), tiny.tree(bert)) == before
    assert not (place / "new").exists()


def test_bad_use_of_an_adapter_is_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, other = str(place / "sst2"), tiny.backbone("bert", tmp_path / "other", initializer_range=0.1)
    renamed = str(tiny.write_csv(tmp_path / "renamed.csv", [{"sentence": "a", "mood": "good"}]))
    for command, says in (
        (["predict", adapter], "TEXT and --file"),
        (["predict", adapter, "a", "--pair", "b", "--pair", "c"], "one --pair for each"),
        (["predict", str(place / "nowhere"), "a"], "no adapter.json"),
        (["predict", adapter, "a", "--backbone", str(tmp_path / "gone")], "no folder of that name"),
        (["predict", adapter, "a", "--backbone", str(other)], "other weights"),
        (["predict", adapter, "a", "--out", str(tmp_path / "gone" / "x.jsonl")], "no such folder"),
        (["predict", adapter, "--file", renamed], "the column 'text'"),
        (["eval", adapter, "--data", renamed], "text"),
        (["show", str(place)], "no adapter.json"),
        (["merge", str(place / "nowhere"), "--out", str(tmp_path / "merged")], "no adapter.json"),
    ):
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert says in said and "Traceback" not in said, said
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_leaves_nothing_half_written(place: Path, bert: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"  # each file at most 6 kB, as on a full disk
        "from graftwork.cli import main\n"
        f"sys.exit(main(['train', '--backbone', {str(bert)!r}, '--data', {str(place / 'rows.csv')!r}, '--steps', '2', "
        f"'--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "out" in done.stderr
    assert not (tmp_path / "out" / "adapter.json").exists()


def test_a_plugin_brings_methods_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "from dataclasses import dataclass\n"
        "from graftwork.core.method import Method, method\n"
        "@method('mine_alone')\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Method):\n"
        "    '''y' = y, and nothing else.'''\n"
    )
    code = (
        f"from graftwork.cli import main; raise SystemExit(main(['--plugin', {str(own)!r}, 'methods', 'mine_alone']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "y' = y" in done.stdout, done.stderr
    assert main(["--plugin", str(tmp_path / "no.py"), "methods"]) == 2
    assert "no Python file" in capsys.readouterr().err
