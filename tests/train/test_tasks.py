"""Each task: a tiny model is trained to a score that the frozen random one is far from, saved, opened again and
used."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from PIL import Image

from graftwork.core.errors import GraftError
from graftwork.train import DataSettings, FitSettings, TrainSettings, open_trained, train
from graftwork.train.columns import Columns
from graftwork.train.metrics import IGNORED
from graftwork.train.run import chosen_split
from graftwork.train.tasks.causal import Causal, chat
from graftwork.train.tasks.masked import Masked

LORA = "lora(r=8, at='linear')"


@dataclass(frozen=True)
class Case:
    backbone: str
    rows: Callable[[int], list[dict[str, Any]]]
    score: str
    reached: float  # after training, at least (or at most, for errors and perplexity)
    untrained: float  # the frozen random model, at most (at least)
    kind: str
    try_on: dict[str, Any]
    answer: Callable[[dict[str, Any]], bool]
    method: str = LORA
    epochs: int = 8
    lr: float = 1e-2
    count: int = 400
    task: str = "auto"


CASES = {
    "text": Case(
        "bert",
        tiny.feelings,
        "accuracy",
        0.95,
        0.7,
        "classification",
        {"text": "the movie was awful"},
        lambda a: a["label"] == "negative" and a["score"] > 0.9,
        lr=5e-3,
    ),
    "pair": Case(
        "bert",
        tiny.pairs,
        "accuracy",
        0.95,
        0.7,
        "classification",
        {"premise": "the movie was good", "hypothesis": "it is dull"},
        lambda a: a["label"] == "other",
        epochs=10,
        lr=5e-3,
        count=600,
    ),
    "regression": Case(
        "bert",
        tiny.balances,
        "r2",
        0.7,
        0.1,
        "regression",
        {"text": "good great good the a a"},
        lambda a: a["value"] > 1.5,
    ),
    "tokens": Case(
        "bert",
        tiny.entities,
        "f1",
        0.95,
        0.4,
        "tokens",
        {"tokens": ["the", "anna", "carla", "oslo"]},
        lambda a: a["tags"] == ["O", "B-PER", "I-PER", "B-LOC"],
    ),
    "causal": Case(
        "llama",
        tiny.alphabets,
        "perplexity",
        1.2,
        20,
        "causal",
        {"text": "a b c"},
        lambda a: a["text"].startswith("d e f"),
        LORA + " + full(at='lm_head')",
        5,
        5e-3,
        300,
    ),
    "prompts": Case(
        "llama",
        lambda n: [{"prompt": r["source"] + " |", "completion": r["target"]} for r in tiny.ciphers(n)],
        "exact",
        0.7,
        0.1,
        "causal",
        {"prompt": "a a |"},
        lambda a: a["text"] == "f f",
        LORA + " + full(at='lm_head')",
        12,
    ),
    "masked": Case(
        "bert",
        lambda n: tiny.alphabets(n, repeat=True),
        "perplexity",
        1.5,
        20,
        "masked",
        {"text": "d d [MASK] d d d"},
        lambda a: a["words"][0][0] == "d",
        epochs=6,
        count=300,
    ),
    "seq2seq": Case(
        "t5",
        tiny.ciphers,
        "token_accuracy",
        0.8,
        0.3,
        "seq2seq",
        {"source": "a a"},
        lambda a: a["text"] == "f f",
        LORA + " + full(at='lm_head')",
    ),
}


def job(backbone: Path, data: Path | str, out: Path, case: Case, **fit: Any) -> TrainSettings:
    return TrainSettings(
        str(backbone),
        str(out),
        DataSettings(str(data), holdout=0.2),
        case.method,
        case.task,
        fit=FitSettings(**fit),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", list(CASES))
def test_a_task_is_learnt(name: str, backbones: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES[name]
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", case.rows(case.count))
    start = train(job(backbones(case.backbone), data, tmp_path / "start", case, steps=1, lr=1e-12))
    result = train(job(backbones(case.backbone), data, tmp_path / "out", case, epochs=case.epochs, lr=case.lr))
    assert result.task.name == case.kind
    reached, before = result.metrics[case.score], start.metrics[case.score]
    if case.score == "perplexity":
        assert reached <= case.reached and before >= case.untrained
    else:
        assert reached >= case.reached and before <= case.untrained
    again = open_trained(tmp_path / "out")
    # the same file on a fresh backbone gives the same scores
    whole = chosen_split(str(data))
    there = type(again)(result.model.eval(), result.adapter, result.task, result.processor)
    assert again.evaluate(whole) == there.evaluate(whole)
    [answer] = again.predict([case.try_on], max_new_tokens=4)
    assert case.answer(answer), answer


def test_digits_are_learnt(backbones: Callable[[str], Path], tmp_path: Path) -> None:
    case = Case("vit", tiny.feelings, "accuracy", 0.85, 0.3, "image", {}, bool, epochs=4, lr=5e-3)
    start = train(job(backbones("vit"), "digits", tmp_path / "start", case, steps=1, lr=1e-12))
    result = train(job(backbones("vit"), "digits", tmp_path / "out", case, epochs=case.epochs, lr=case.lr))
    assert result.metrics["accuracy"] >= case.reached and start.metrics["accuracy"] <= case.untrained


def test_a_folder_of_images_is_learnt(backbones: Callable[[str], Path], tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for label, where in (("left", slice(0, 4)), ("right", slice(4, 8))):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for i in range(60):
            image = draw.integers(0, 90, (8, 8), dtype=np.uint8)
            image[:, where] += 150
            Image.fromarray(image).save(folder / f"{i}.png")
    case = Case("vit", tiny.feelings, "accuracy", 0.95, 0.8, "image", {}, bool)
    result = train(job(backbones("vit"), tmp_path / "images", tmp_path / "out", case, epochs=4, lr=5e-3))
    assert result.metrics["accuracy"] >= 0.95
    [answer] = open_trained(tmp_path / "out").predict([{"image": str(tmp_path / "images" / "left" / "0.png")}])
    assert answer["label"] == "left"


@pytest.mark.parametrize("template", [tiny.CHAT, tiny.CHAT_MARKED], ids=["plain", "marked"])
def test_chats_train_the_answers_only(template: str) -> None:
    words = tiny.tokenizer("plain")
    words.chat_template = template
    turns = [{"role": "user", "content": "the a"}, {"role": "assistant", "content": "b c"}] * 2
    tokens, labels = chat(words, turns, 1)
    assert words.decode(tokens) == "user : the a </s> assistant : b c </s> user : the a </s> assistant : b c </s>"
    assert words.decode([t for t in labels if t != IGNORED]) == "b c </s> b c </s>"


def test_chats_are_learnt(tmp_path: Path) -> None:
    backbone = tiny.backbone("llama", tmp_path / "llama", chat=tiny.CHAT)
    data = tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.chats(300))
    case = Case("llama", tiny.chats, "exact", 0.95, 0.2, "causal", {}, bool, LORA + " + full(at='lm_head')")
    result = train(job(backbone, data, tmp_path / "out", case, epochs=6, lr=5e-3))
    assert result.task.columns.kind == "messages" and result.metrics["exact"] >= 0.95
    [answer] = open_trained(tmp_path / "out").predict([{"messages": [{"role": "user", "content": "the b"}]}])
    assert answer["text"] == "c"


def test_chats_that_teach_nothing_are_refused() -> None:
    words = tiny.tokenizer("plain")
    turns = [{"role": "user", "content": "the a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(GraftError, match="without a chat template"):
        chat(words, turns, 1)
    words.chat_template = tiny.CHAT
    with pytest.raises(GraftError, match="none in row 3"):
        chat(words, turns[:1], 3)
    words.chat_template = (
        "{% for m in messages %}{{ 'abcd'[loop.revindex] }} {{ m['content'] }} {% endfor %}"  # counts from the end
    )
    with pytest.raises(GraftError, match="differently from the whole"):
        chat(words, turns, 1)
    words.chat_template = tiny.CHAT_MARKED.replace("{% endgeneration %} ", " {% endgeneration %}")
    with pytest.raises(GraftError, match="1 marked stretches for 2 answers"):
        chat(words, turns * 2, 1)


def test_a_long_text_is_cut_into_rows_and_lost_nowhere() -> None:
    words = tiny.tokenizer("plain")
    rows = Dataset.from_list([{"text": " ".join(random.Random(0).choices(tiny.LETTERS, k=50))}])
    encoded = Causal(Columns("plain", "text"), max_length=8).encode(rows, words)
    joined = [t for row in encoded["input_ids"] for t in row]
    assert words.decode(joined) == rows[0]["text"] + " </s>"
    assert max(map(len, encoded["input_ids"])) == 8


def test_what_is_hidden_depends_on_seed_row_and_epoch_alone() -> None:
    words = tiny.tokenizer("bert")
    rows = Dataset.from_list(tiny.alphabets(40))
    task = Masked(Columns("plain", "text"), seed=3)
    encoded = list(task.encode(rows, words, training=True))
    one, two = task.collator(words, None), task.collator(words, None)
    torch.manual_seed(1)
    first = one(encoded)
    torch.manual_seed(2)
    whole, part = two(encoded), two(encoded[10:12])
    assert torch.equal(first["input_ids"], whole["input_ids"]) and torch.equal(whole["labels"][10:12], part["labels"])
    one.epoch = 1
    assert not torch.equal(one(encoded)["labels"], first["labels"])
    hidden = first["labels"] != IGNORED
    assert 0.1 < hidden.float().sum() / (40 * 8) < 0.3 and hidden.any(1).all()
    assert torch.equal(first["input_ids"][~hidden], torch.tensor([r["input_ids"] for r in encoded])[~hidden])
    fixed = list(task.encode(rows, words))
    assert torch.equal(one(fixed)["labels"], two(fixed)["labels"])
