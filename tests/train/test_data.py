"""Reading rows and finding columns."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd
import pytest
import tiny
from datasets import ClassLabel, Dataset
from PIL import Image

from graftwork.core.errors import GraftError
from graftwork.train import data
from graftwork.train.columns import find, label_texts, ordered
from graftwork.train.settings import DataSettings

ROWS = [{"text": "one, two", "label": "a"}, {"text": 'say "no"', "label": "b"}, {"text": "NA", "label": "a"}]


def settings(**given: str) -> DataSettings:
    return DataSettings("x", **given)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        tiny.write_csv(path, ROWS)
    elif kind == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in ROWS))
    elif kind == "jsonl":
        tiny.write_jsonl(path, ROWS)
    elif kind == "json":
        pd.DataFrame(ROWS).to_json(path, orient="records")
    else:
        pd.DataFrame(ROWS).to_parquet(path)
    rows = data.read(str(path))["train"]
    assert [dict(row) for row in rows] == ROWS


def test_words_that_look_like_gaps_and_numbers_stay_words(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nnull,007\nNA,1\nNone,02\n")
    rows = data.read(str(path))["train"]
    assert list(rows["text"]) == ["null", "NA", "None"]
    assert list(rows["label"]) == ["007", "1", "02"]


def test_a_stray_quotation_mark_in_tabs_is_a_word(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n" she said\t1\nit is 5 " wide\t0\n')
    assert list(data.read(str(path))["train"]["text"]) == ['" she said', 'it is 5 " wide']


def test_quoted_tabs_and_line_ends_are_read(tmp_path: Path) -> None:
    rows = [{"text": "a\tb", "label": "1"}, {"text": "c", "label": "0"}]
    assert list(data.read(str(tiny.write_csv(tmp_path / "t.tsv", rows, "\t")))["train"]["text"]) == ["a\tb", "c"]
    rows = [{"text": "two\nlines", "label": "1"}, {"text": "a \u2028 mark", "label": "0"}]
    assert list(data.read(str(tiny.write_csv(tmp_path / "t.csv", rows)))["train"]["text"]) == [
        "two\nlines",
        "a \u2028 mark",
    ]
    assert list(data.read(str(tiny.write_jsonl(tmp_path / "t.jsonl", rows)))["train"]["text"]) == [
        "two\nlines",
        "a \u2028 mark",
    ]


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for name, rows in (("train", ROWS), ("dev", ROWS[:2]), ("test", ROWS[:1])):
        tiny.write_csv(tmp_path / f"{name}.csv", rows)
    found = data.read(str(tmp_path))
    assert {k: len(v) for k, v in found.items()} == {"train": 3, "eval": 2, "test": 1}


def test_a_folder_of_images(tmp_path: Path) -> None:
    for split, label, shade in (("train", "dark", 10), ("train", "light", 240), ("test", "dark", 0)):
        folder = tmp_path / split / label
        folder.mkdir(parents=True)
        Image.new("L", (8, 8), shade).save(folder / "1.png")
    found = data.read(str(tmp_path))
    assert {k: sorted(v["label"]) for k, v in found.items()} == {"train": ["dark", "light"], "test": ["dark"]}


def test_digits_are_the_real_ones() -> None:
    rows = data.read("digits")["train"]
    assert len(rows) == 1797 and len(set(rows["label"])) == 10


def test_hub_names_are_read_as_owner_and_as_config(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(*arguments: str, data_files: dict[str, str] | None = None) -> dict[str, Dataset]:
        asked.append(arguments if data_files is None else (*arguments, data_files))
        if arguments not in [("glue", "sst2"), ("owner/set",), ("owner/set", "small")]:
            raise FileNotFoundError(f"no {arguments}")
        rows = Dataset.from_list([{"text": "x", "label": 0}])
        held_back = Dataset.from_list([{"text": "x", "label": -1}]).cast_column("label", ClassLabel(names=["a", "b"]))
        return {"train": rows, "validation": rows, "test": held_back, "unsupervised": rows}

    monkeypatch.setattr(data, "load_dataset", fake)
    for name in ("glue/sst2", "owner/set", "owner/set/small"):
        assert set(data.read(f"hub:{name}")) == {"train", "eval"}
    assert asked == [("glue/sst2",), ("glue", "sst2"), ("owner/set",), ("owner/set", "small")]
    data.read("hub:owner/set/*.tar")
    assert asked[-1] == ("owner/set", {"train": "train/*.tar", "test": "test/*.tar"})
    with pytest.raises(GraftError, match="hub:nothing"):
        data.read("hub:nothing")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.csv", None, "no such file"),
        ("empty.csv", b"", "empty"),
        ("head.csv", b"text,label\n", "no rows"),
        ("ragged.csv", b"text,label\na,1\nb,1,2\n", "row 3 has 3 columns"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("list.jsonl", b"[1, 2]\n", "named columns"),
        ("broken.parquet", b"PAR2 nothing", "PAR1"),
        ("cut.parquet", b"PAR1 nothing", "parquet"),
        ("latin.csv", b"text,label\n\xff\xfe,1\n", "utf-8"),
        ("table.xlsx", b"x", "kind"),
        ("packed.csv.gz", gzip.compress(b"text,label\n", mtime=0), "kind"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",  # bytes in a name differ between workers
)
def test_files_that_cannot_be_read_say_why(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraftError, match=says):
        data.read(str(path))


@pytest.mark.parametrize(
    ("columns", "given", "kind", "named"),
    [
        ({"sentence": "x", "label": "1"}, {}, "texts", ("sentence", None, "label")),
        ({"premise": "x", "hypothesis": "y", "label": "1"}, {}, "texts", ("premise", "hypothesis", "label")),
        ({"question": "x", "sentence": "y", "label": "1"}, {}, "texts", ("question", "sentence", "label")),
        ({"Review": "x", "Stars": "1"}, {}, "texts", ("Review", None, "Stars")),
        ({"body_of_mail": "x", "spam": "1"}, {"label": "spam"}, "texts", ("body_of_mail", None, "spam")),
        ({"a": "x", "b": "y", "c": "1"}, {"text": "a", "pair": "b", "label": "c"}, "texts", ("a", "b", "c")),
        ({"tokens": ["x"], "ner_tags": ["O"]}, {}, "tokens", ("tokens", None, "ner_tags")),
        ({"prompt": "x", "completion": "y"}, {}, "source", ("prompt", None, "completion")),
        ({"document": "x", "summary": "y"}, {}, "source", ("document", None, "summary")),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "messages", ("messages", None, None)),
        ({"text": "x"}, {}, "plain", ("text", None, None)),
        ({"image": "x.png", "label": "1"}, {}, "image", ("image", None, "label")),
        ({"image": "x.png", "said": "y", "label": "1"}, {"text": "said"}, "texts", ("said", None, "label")),
    ],
)
def test_columns_are_guessed_and_can_be_named(columns: dict, given: dict, kind: str, named: tuple) -> None:
    found = find(Dataset.from_list([columns]), settings(**given))
    assert (found.kind, (found.text, found.pair, found.label)) == (kind, named)


def test_a_label_that_is_missing_says_what_there_is() -> None:
    rows = Dataset.from_list([{"text": "x", "weight": "3"}])
    with pytest.raises(GraftError, match=r"(?s)column with the label.*text, weight.*--label"):
        find(rows, settings())
    with pytest.raises(GraftError, match=r"(?s)--label wieght.*did you mean 'weight'"):
        find(rows, settings(label="wieght"))
    with pytest.raises(GraftError, match="row 2 has none"):
        label_texts(Dataset.from_list([{"label": "a"}, {"label": None}]), "label", "the rows")


def test_labels_are_in_the_order_of_numbers() -> None:
    assert ordered(["10", "9", "2", "2"]) == ["2", "9", "10"]
    assert ordered(["b", "a", "10"]) == ["10", "a", "b"]
    assert label_texts(Dataset.from_list([{"y": 1.0}, {"y": 2.5}]), "y", "") == ["1", "2.5"]
