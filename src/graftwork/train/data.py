"""Reading rows: files, folders of files, folders of images, the hub, scikit-learn's digits. Nothing here knows a task.

What comes out is a dictionary of `datasets.Dataset` under the names train, eval and test, as far as the source has
them. Values of text files stay texts ("007", "NA" and "null" are words, not numbers or gaps): what a column means
is decided in `columns`.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from ..core.errors import GraftError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SPLITS = {
    "train": ("train", "training"),
    "eval": ("validation", "valid", "val", "dev", "eval", "validation_matched"),
    "test": ("test", "testing"),
}


def read(source: str) -> dict[str, Dataset]:
    """The splits of a source. A single file, and a folder without named splits, is all "train". GraftError where
    it cannot be read."""
    if source == "digits":
        return {"train": digits()}
    if source.startswith("hub:"):
        return hub(source[len("hub:") :])
    path = Path(source).expanduser()
    if path.is_dir():
        return folder(path)
    if not path.is_file():
        raise GraftError(
            f"the data {source!r}", "no such file or folder", "give a file, a folder, hub:NAME[/CONFIG] or digits"
        )
    return {"train": read_file(path)}


def read_file(path: Path) -> Dataset:
    """The rows of one file."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise GraftError(
            f"the data {str(path)!r}",
            f"a file of the kind {suffix or 'without suffix'!r}",
            f"give one of {' '.join(SUFFIXES)}",
        )
    if path.stat().st_size == 0:
        raise GraftError(f"the data {str(path)!r}", "the file is empty", "give a file with rows")
    try:
        if suffix == ".parquet":
            rows = Dataset.from_parquet(str(path), keep_in_memory=True) if _is_parquet(path) else _refuse_parquet()
        elif suffix in (".jsonl", ".json"):
            rows = _table(_json_rows(path))
        elif suffix == ".txt":
            rows = _table([{"text": line} for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()])
        else:
            rows = _table(_csv_rows(path, "\t" if suffix == ".tsv" else ","))
    except GraftError:
        raise
    except (ValueError, OSError, csv.Error, UnicodeDecodeError, pa.ArrowException) as error:
        raise GraftError(
            f"the data {str(path)!r}", f"it cannot be read as {suffix[1:]}: {error}", "check the file"
        ) from error
    if len(rows) == 0:
        raise GraftError(f"the data {str(path)!r}", "no rows", "give a file with rows")
    return rows


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _refuse_parquet() -> Dataset:
    raise ValueError("it does not begin with PAR1")


def _table(rows: list[dict[str, Any]]) -> Dataset:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset(pa.table({name: pa.array([row.get(name) for row in rows]) for name in names}))


def _csv_rows(path: Path, separator: str) -> list[dict[str, Any]]:
    """The rows of a table with a header. Tabs separate without quoting (a stray quotation mark is a word of the
    text) unless the rows fit the header only when quotes are read as such."""
    text = path.read_text(encoding="utf-8-sig")
    csv.field_size_limit(2**31 - 1)
    quoting: list[Any] = [csv.QUOTE_NONE, csv.QUOTE_MINIMAL] if separator == "\t" else [csv.QUOTE_MINIMAL]
    bad = (0, 0)
    for rule in quoting:
        table = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=rule) if row]
        header, body = table[0], table[1:]
        ragged = [(number, len(row)) for number, row in enumerate(body, 2) if len(row) != len(header)]
        if not ragged:
            return [dict(zip(header, row, strict=True)) for row in body]
        bad = ragged[0]
    raise ValueError(f"row {bad[0]} has {bad[1]} columns, the header {len(header)} ({', '.join(header)})")


def _json_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every row must be an object with named columns")
    return rows


def folder(path: Path) -> dict[str, Dataset]:
    """A folder of data files named after their splits, or of images (one folder per label, perhaps under train/
    and test/)."""
    files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix.lower() in SUFFIXES and f.name[0] not in "._")
    if files:
        named = {split: f for f in files if (split := _split_of(f.stem)) is not None}
        if not named and len(files) > 1:
            raise GraftError(
                f"the data folder {str(path)!r}",
                f"{len(files)} files, none named train",
                "name them train, dev and test",
            )
        return {split: read_file(f) for split, f in named.items()} if named else {"train": read_file(files[0])}
    below = {split: d for d in sorted(path.iterdir()) if d.is_dir() and (split := _split_of(d.name)) is not None}
    return {split: image_folder(d) for split, d in below.items()} if below else {"train": image_folder(path)}


def _split_of(stem: str) -> str | None:
    """train, eval or test for a file or folder name such as train, train-00000-of-00001, dev or test."""
    word = stem.lower().split("-")[0].split(".")[0]
    return next((split for split, names in SPLITS.items() if word in names), None)


def image_folder(path: Path) -> Dataset:
    """Rows {image: path, label: name of its folder}."""
    found = sorted(f for f in path.glob("*/*") if f.suffix.lower() in IMAGES and f.name[0] != ".")
    if not found:
        raise GraftError(
            f"the data folder {str(path)!r}",
            "neither data files nor images in one folder per label",
            f"put in files ({' '.join(SUFFIXES)}) or images ({' '.join(IMAGES[:3])} ...)",
        )
    return _table([{"image": str(f), "label": f.parent.name} for f in found])


def digits() -> Dataset:
    """The 1,797 real 8x8 images that come with scikit-learn, as grey values 0 to 255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images * 255 / 16).round().astype("uint8")
    return _table(
        [{"image": image.tolist(), "label": str(int(label))} for image, label in zip(images, data.target, strict=True)]
    )


def hub(name: str) -> dict[str, Dataset]:
    """NAME, NAME/CONFIG, OWNER/NAME or OWNER/NAME/CONFIG of the hub. Two words are read as an owner's data set
    first. OWNER/NAME/*.tar: only such files of its folders train and test, where others lie beside them."""
    parts = name.strip("/").split("/")
    files = {split: f"{split}/{parts[-1]}" for split in ("train", "test")} if "*" in parts[-1] else None
    parts = parts[: None if files is None else -1]
    tries: list[tuple[str, ...]] = [] if len(parts) > 3 else [("/".join(parts[:2]), *parts[2:])]
    if len(parts) == 2 and files is None:
        tries.append((parts[0], parts[1]))
    problem: Exception | None = None
    for arguments in tries:
        try:
            return _known_splits(load_dataset(*arguments, data_files=files), f"hub:{name}")
        except GraftError:
            raise
        except Exception as error:  # the hub's client raises many kinds; each means: not this reading of the name
            problem = problem if problem is not None and _missing(error) else error
    found = f"{type(problem).__name__}: {problem}" if problem else f"{len(parts)} parts"
    raise GraftError(f"the data hub:{name}", found, "write hub:NAME, hub:NAME/CONFIG or hub:OWNER/NAME/CONFIG")


def _missing(error: Exception) -> bool:
    return type(error).__name__ == "DatasetNotFoundError"


def _unlabelled(rows: Dataset) -> bool:
    """Whether the labels are kept back, as in the test splits of competitions (-1)."""
    named = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    return len(rows) > 0 and any(rows[0][name] == -1 for name in named)


def _known_splits(loaded: DatasetDict, name: str) -> dict[str, Dataset]:
    splits: dict[str, Dataset] = {}
    for key in loaded:
        split = _split_of(str(key))
        if split is not None and split not in splits and not _unlabelled(loaded[key]):
            splits[split] = loaded[key]
    if "train" not in splits:
        raise GraftError(
            f"the data {name}", f"the splits {', '.join(map(str, loaded))}", "choose a data set with a train split"
        )
    return splits
