"""Which column is the text, the pair, the label...: named by the user, or guessed from the names and the values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Image, List

from ..core.errors import GraftError, nearest
from .settings import DataSettings

MESSAGES = ("messages", "conversations", "conversation", "chat", "dialogue")
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "pos_tags", "chunk_tags", "tag_ids", "labels", "label")
IMAGE = ("image", "img", "picture")
LABEL = (
    "label",
    "labels",
    "class",
    "cls",
    "category",
    "target",
    "score",
    "rating",
    "sentiment",
    "intent",
    "topic",
    "stars",
    "y",
    "gold_label",
)
TEXT = (
    "text",
    "sentence",
    "content",
    "review",
    "document",
    "body",
    "comment",
    "tweet",
    "title",
    "question",
    "utterance",
    "query",
    "input",
)
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
)
SOURCE_TARGET = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("source", "target"),
    ("input", "output"),
    ("src", "tgt"),
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("text", "target"),
    ("question", "answer"),
)
# as often a text and its class: read as two texts only if the task is named
OFTEN_CLASSES = (("text", "target"), ("question", "answer"), ("input", "output"))


@dataclass(frozen=True)
class Columns:
    """The columns that were found, and what kind of rows they make.

    kind: "messages", "tokens", "image", "texts" (with a label), "source" (a text and a target text), or "plain"
    (text only).  task: that with the task of each row, for methods that learn something for each task.
    """

    kind: str
    text: str
    pair: str | None = None
    label: str | None = None
    task: str | None = None

    def describe(self) -> str:
        """For people: text='sentence', label='label'."""
        named = {"text": self.text, "pair": self.pair, "label": self.label, "task": self.task}
        return ", ".join(f"{k}={v!r}" for k, v in named.items() if v)


def find(rows: Dataset, settings: DataSettings, task: str = "auto") -> Columns:
    """The columns of these rows for this task. GraftError where a named one is missing or nothing fits."""
    names = rows.column_names
    for option, name in (("text", settings.text), ("pair", settings.pair), ("label", settings.label)):
        if name is not None and name not in names:
            raise GraftError(
                f"--{option} {name}", f"the columns {', '.join(names)}{nearest(name, names)}", "name one of them"
            )
    lower = {name.lower(): name for name in reversed(names)}

    def first(words: Sequence[str], unless: str | None = None) -> str | None:
        return next((lower[w] for w in words if w in lower and lower[w] != unless), None)

    if (
        task in ("auto", "causal")
        and settings.text is None
        and (name := first(MESSAGES))
        and _holds_messages(rows, name)
    ):
        return Columns("messages", name)
    if task in ("auto", "tokens"):
        text = settings.text or first(TOKENS)
        label = settings.label or first(TAGS, unless=text)
        if text and label and (task == "tokens" or _is_list(rows, text)):
            return Columns("tokens", text, label=label)
        if task == "tokens":
            raise _missing("a column with tokens and one with their tags", names, "--text COLUMN --label COLUMN")
    if task in ("auto", "image"):
        text = settings.text or first(IMAGE) or _only_image(rows)
        if text and (task == "image" or settings.text is None or text.lower() in IMAGE or _is_image(rows, text)):
            return Columns("image", text, label=settings.label or first(LABEL, unless=text) or _needs_label(names))
        if task == "image":
            raise _missing("a column with images", names, "--text COLUMN")
    if task in ("auto", "seq2seq", "causal") and settings.pair is None:
        found = _source_target(settings, lower, task)
        if found:
            return Columns("source", found[0], label=found[1])
        if task == "seq2seq":
            raise _missing(
                "a column with source texts and one with target texts", names, "--text COLUMN --label COLUMN"
            )
    return _texts(rows, settings, task, lower)


def _texts(rows: Dataset, settings: DataSettings, task: str, lower: dict[str, str]) -> Columns:
    """A text or a pair of texts, with a label unless the task needs none."""
    names = rows.column_names
    label = settings.label or next(
        (lower[w] for w in LABEL if w in lower and lower[w] not in (settings.text, settings.pair)), None
    )
    text, pair = settings.text, settings.pair
    if text is None and pair is None:
        found = next(
            ((lower[a], lower[b]) for a, b in PAIRS if a in lower and b in lower and label not in (lower[a], lower[b])),
            None,
        )
        text, pair = found or (None, None)
    if text is None:
        others = [n for n in names if n not in (label, pair)]
        text = next((lower[w] for w in TEXT if w in lower and lower[w] in others), None)
        # not a known name: the one column left that holds texts
        strings = [n for n in others if _is_string(rows, n)]
        text = text or (strings[0] if len(strings) == 1 else None)
    if text is None:
        raise _missing("a column with texts", names, "--text COLUMN")
    if task in ("causal", "masked"):
        return Columns("plain", text)
    if label is None:
        only = [n for n in names if n not in (text, pair)]
        if task in ("classification", "regression") or only:
            _needs_label(names)
        return Columns("plain", text)
    return Columns("texts", text, pair, label)


def _source_target(settings: DataSettings, lower: dict[str, str], task: str) -> tuple[str, str] | None:
    if task != "auto" and settings.text and settings.label:
        return settings.text, settings.label
    for a, b in SOURCE_TARGET:
        if a in lower and b in lower and settings.text in (None, lower[a]) and settings.label in (None, lower[b]):
            if task == "auto" and (a, b) in OFTEN_CLASSES:
                continue
            return lower[a], lower[b]
    return None


def _needs_label(names: Sequence[str]) -> str:
    raise _missing("a column with the label", names, "--label COLUMN")


def _missing(wanted: str, names: Sequence[str], do: str) -> GraftError:
    return GraftError(wanted, f"the columns {', '.join(names)}", f"name it: {do}")


def _is_list(rows: Dataset, name: str) -> bool:
    return isinstance(rows.features[name], List | list)


def _is_string(rows: Dataset, name: str) -> bool:
    return getattr(rows.features[name], "dtype", "") in ("string", "large_string")


def _is_image(rows: Dataset, name: str) -> bool:
    return isinstance(rows.features[name], Image)


def _only_image(rows: Dataset) -> str | None:
    """The one column of images, whatever its name."""
    found = [name for name in rows.column_names if _is_image(rows, name)]
    return found[0] if len(found) == 1 else None


def _holds_messages(rows: Dataset, name: str) -> bool:
    return _is_list(rows, name) and len(rows) > 0 and bool(rows[0][name]) and isinstance(rows[0][name][0], dict)


def label_texts(rows: Dataset, column: str, where: str) -> list[Any]:
    """The labels of a column as texts: names of a hub's class labels, "1" for 1, 1.0 and True stays "True".
    GraftError at a gap."""
    feature = rows.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    out: list[str] = []
    for number, value in enumerate(rows[column]):
        missing = value is None or value == "" or (names is not None and value < 0) or value != value
        if missing:
            raise GraftError(
                f"the labels of {where}",
                f"row {number + 1} has none in the column {column!r}",
                "give every row a label",
            )
        out.append(label_text(value, names))
    return out


def label_text(value: Any, names: Sequence[str] | None = None) -> str:
    """One label as text."""
    if names is not None:
        return str(names[value])
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def tag_texts(rows: Dataset, column: str) -> list[list[str]]:
    """The tags of each row as texts; a text is split at spaces."""
    feature = rows.features[column]
    inner = getattr(feature, "feature", None)
    names = inner.names if isinstance(inner, ClassLabel) else None
    return [[label_text(tag, names) for tag in (row.split() if isinstance(row, str) else row)] for row in rows[column]]


def as_number(text: str) -> float | None:
    """The finite number a text is, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number - number == 0 else None


def ordered(labels: Sequence[str]) -> list[str]:
    """The distinct labels, numbers in their order and texts alphabetically."""
    distinct = set(labels)
    if all(as_number(x) is not None for x in distinct):
        return sorted(distinct, key=lambda x: (float(x), x))
    return sorted(distinct)
