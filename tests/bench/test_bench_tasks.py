"""Rows are chosen once, none is in two of train, dev and test, and the suites measure what papers do."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from PIL import Image

from graftwork.bench.chosen import labels, task_of
from graftwork.bench.published import PUBLISHED
from graftwork.bench.settings import BenchSettings
from graftwork.bench.suites import GLUE, SUITES, VTAB
from graftwork.bench.tasks import BOTH, DEV, TEST, TRAIN, rows, sources, split
from graftwork.core.errors import GraftError
from graftwork.train.data import read
from graftwork.train.tasks.image import open_image


def settings(tmp_path: Path, **given) -> BenchSettings:
    return BenchSettings(**{"backbone": "b", "out": str(tmp_path / "out"), "tasks": "sst2", **given})


def numbered(count: int, start: int = 0) -> Dataset:
    return Dataset.from_list([{"text": f"row {i}", "label": str(i % 2)} for i in range(start, start + count)])


def texts(part: Dataset) -> set[str]:
    return set(part["text"])


def test_no_row_is_in_two_parts(tmp_path: Path) -> None:
    s = settings(tmp_path, tasks="it=x", train_rows=50)
    parts = split(sources(s)[0], {"train": numbered(200)}, s)
    assert [len(parts[name]) for name in (TRAIN, DEV, TEST, BOTH)] == [50, 16, 40, 66]
    assert not texts(parts[TRAIN]) & texts(parts[DEV]) and not texts(parts[BOTH]) & texts(parts[TEST])
    again = split(sources(s)[0], {"train": numbered(200)}, s)
    assert all(parts[name]["text"] == again[name]["text"] for name in parts)


def test_splits_that_the_source_brings_are_kept(tmp_path: Path) -> None:
    s = settings(tmp_path, tasks="it=x", dev_rows=5, test_rows=7)
    found = {"train": numbered(100), "eval": numbered(20, 100), "test": numbered(30, 200)}
    parts = split(sources(s)[0], found, s)
    assert [len(parts[name]) for name in (TRAIN, DEV, TEST)] == [100, 5, 7]
    assert texts(parts[DEV]) <= texts(found["eval"]) and texts(parts[TEST]) <= texts(found["test"])
    # without a test split the evaluation split is tested on, and the dev rows are taken from the training rows
    parts = split(sources(s)[0], {k: found[k] for k in ("train", "eval")}, s)
    assert texts(parts[TEST]) <= texts(found["eval"]) and texts(parts[DEV]) <= texts(found["train"])
    assert not texts(parts[DEV]) & texts(parts[TRAIN])


def test_rows_are_written_once(tmp_path: Path) -> None:
    file = tiny.write_csv(tmp_path / "rows.csv", tiny.feelings(40))
    s = settings(tmp_path, tasks=f"it={file}")
    [source] = sources(s)
    first = rows(source, s)
    before = tiny.tree(first.folder)
    file.unlink()
    assert rows(source, s) == first and tiny.tree(first.folder) == before
    assert len(read(str(first.folder / TRAIN))["train"]) == 29


def test_unknown_tasks_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=r"'sst3'(.|\n)*did you mean 'sst2'"):
        sources(settings(tmp_path, tasks="sst3"))
    with pytest.raises(GraftError, match=r"'colla'(.|\n)*did you mean 'cola'"):
        sources(settings(tmp_path, tasks="colla", suite="glue"))
    with pytest.raises(GraftError, match=r"glu(.|\n)*did you mean 'glue'"):
        sources(settings(tmp_path, suite="glu"))
    with pytest.raises(GraftError, match="twice"):
        sources(settings(tmp_path, tasks="a=x, a=y"))
    with pytest.raises(GraftError, match="no such file"):
        rows(sources(settings(tmp_path, tasks="a=/nowhere"))[0], settings(tmp_path))


def test_unknown_methods_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="did you mean 'lora'"):
        labels(settings(tmp_path, methods="lroa"))
    with pytest.raises(GraftError, match="not methods"):
        labels(settings(tmp_path, methods="lora(r=8"))
    chosen = labels(settings(tmp_path, methods='lora(at="q, k"), prefix(length=3) + parallel(d=4), ia3'))
    assert list(chosen) == ['lora(at="q, k")', "prefix(length=3) + parallel(d=4)", "ia3"]
    every = labels(settings(tmp_path, methods="all"))
    assert {"lora", "bottleneck", "mam", "fusion"} <= set(every) and not any(every.values())


def glue(name: str, count: int) -> Dataset:
    """Rows as the hub's GLUE has them: an index, and labels as classes or, for stsb, numbers."""
    text = {s.name: [c for c in (s.text, s.pair) if c] for s in GLUE}[name]
    said = [row["premise"] for row in tiny.pairs(count)]
    other = [row["hypothesis"] for row in tiny.pairs(count)]
    columns = {column: said if i == 0 else other for i, column in enumerate(text)}
    if name == "stsb":
        return Dataset.from_dict({**columns, "label": [i % 11 / 2 for i in range(count)], "idx": list(range(count))})
    kind = ClassLabel(names=["no", "yes", "maybe"][: 3 if name == "mnli" else 2])
    features = Features({**{c: Value("string") for c in columns}, "label": kind, "idx": Value("int32")})
    labels = [i % kind.num_classes for i in range(count)]
    return Dataset.from_dict({**columns, "label": labels, "idx": list(range(count))}, features=features)


@pytest.mark.parametrize("source", GLUE, ids=lambda s: s.name)
def test_glue_is_measured_as_published(source, bert: Path, tmp_path: Path) -> None:
    """The hub's folder of one task, made here: train, validation, and a test split whose labels are kept back."""
    folder = tmp_path / source.name
    folder.mkdir()
    glue(source.name, 60).to_parquet(folder / "train.parquet")
    glue(source.name, 20).to_parquet(folder / "validation.parquet")
    s = settings(tmp_path, backbone=str(bert), suite="glue", tasks=f"{source.name}={folder}", methods="lora")
    [asked] = sources(s)
    assert replace(asked, place=source.place) == source
    task, _ = task_of(rows(asked, s), s, lambda text: None)
    assert len(read(str(task.rows.folder / TEST))["train"]) == 20  # all of the validation rows
    assert task.metric == {"cola": "matthews", "stsb": "pearson"}.get(source.name, "accuracy") and task.larger


def test_vtab_learns_from_a_thousand_rows_once_the_rate_is_chosen(tmp_path: Path) -> None:
    s = settings(tmp_path, suite="vtab", tasks="dtd")
    [source] = sources(s)
    found = {"train": numbered(3000), "eval": numbered(50, 3000), "test": numbered(70, 4000)}
    parts = split(source, found, s)
    assert [len(parts[name]) for name in (TRAIN, DEV, BOTH, TEST)] == [800, 200, 1000, 70]


def archive(file: Path, images: int) -> None:
    """One of CLIP benchmark's: images as webp, and the number of the class beside each."""
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w") as tar:
        for i in range(images):
            drawn = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), 40 * (i % 3), dtype=np.uint8)).save(drawn, "webp", lossless=True)
            for name, content in ((f"s{i:07d}.webp", drawn.getvalue()), (f"s{i:07d}.cls", str(i % 3).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_vtabs_archives_are_read_as_the_hub_lays_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "clip-benchmark" / "wds_vtab-dmlab"
    archive(home / "train" / "0.tar", 2000)
    archive(home / "test" / "0.tar", 30)
    for split_, count in (("train", 1), ("test", 1)):
        (home / split_ / "nshards.txt").write_text(str(count))
    (home / "classnames.txt").write_text("one\ntwo\nthree")
    monkeypatch.setattr(
        "graftwork.train.data.load_dataset",
        lambda name, data_files: load_dataset(
            str(tmp_path / name), data_files=data_files, cache_dir=str(tmp_path / "cache")
        ),
    )
    s = settings(
        tmp_path, backbone=str(tiny.backbone("vit", tmp_path / "vit")), suite="vtab", tasks="dmlab", methods="lora"
    )
    [source] = sources(s)
    task, model = task_of(rows(source, s), s, lambda text: None)
    written = {name: read(str(task.rows.folder / name))["train"] for name in (TRAIN, DEV, BOTH, TEST)}
    assert {name: len(part) for name, part in written.items()} == {TRAIN: 800, DEV: 200, BOTH: 1000, TEST: 30}
    assert task.metric == "accuracy" and not task.padded and model.config.num_labels == 3
    for row in written[TEST].select(range(5)):
        assert np.asarray(open_image(row["webp"]))[0, 0, 0] == 40 * row["cls"]


def test_published_numbers_name_tasks_that_exist_and_their_source() -> None:
    for one in PUBLISHED:
        assert set(one.scores) <= {s.name for s in SUITES[one.suite]}
        assert ("arXiv" in one.source or "NeurIPS" in one.source) and all(
            0 < score < 100 for score in one.scores.values()
        )
    lora = next(p for p in PUBLISHED if (p.backbone, p.method) == ("roberta-base", "LoRA"))
    assert round(sum(lora.scores.values()) / 8, 1) == 87.2  # the average that the paper prints


# the means of the natural, specialised and structured tasks that the paper prints, of unrounded scores
VPT = {"full tuning": (75.88, 83.36, 47.64), "linear probe": (68.93, 77.16, 26.84), "VPT-deep": (78.48, 82.43, 54.98)}
# the mean over all tasks
ALL = {
    "BitFit": 62.05,
    "Adapter": 71.44,
    "LoRA": 72.25,
    "AdaptFormer": 72.32,
    "SSF": 73.10,
    "Hydra": 74.21,
    "LST": 71.70,
}


@pytest.mark.parametrize("one", [p for p in PUBLISHED if p.suite == "vtab"], ids=lambda p: p.method)
def test_vtabs_published_scores_have_the_means_that_are_printed(one) -> None:
    scores = [one.scores[s.name] for s in VTAB]
    assert len(scores) == 19
    if one.method in VPT:
        means = [sum(part) / len(part) for part in (scores[:7], scores[7:11], scores[11:])]
        assert means == pytest.approx(VPT[one.method], abs=0.02)
    else:
        assert sum(scores) / 19 == pytest.approx(ALL[one.method], abs=0.006)
