"""The next token: plain texts, prompts with completions, and chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ...core.errors import GraftError
from .. import metrics
from ..metrics import IGNORED
from .base import Collator, Task, first, length, need, pad, texts, with_columns

Sequences = list[tuple[list[int], list[int]]]  # per row: tokens, labels


@dataclass(frozen=True)
class Causal(Task):
    """A language model. Plain texts are learnt whole; of prompts and chats only the answers are. Scores:
    perplexity, token accuracy, and the share of rows that greedy generation gets exactly right."""

    name = "causal"
    auto = "AutoModelForCausalLM"
    best = "perplexity"
    larger = False

    def encode(self, rows: Dataset, processor: Any, *, labelled: bool = True, training: bool = False) -> Dataset:
        limit = length(self, processor)
        need(rows, self.columns.text)
        if self.columns.kind == "messages":
            sequences = [
                chat(processor, messages, number) for number, messages in enumerate(rows[self.columns.text], 1)
            ]
        elif self.columns.kind == "source":
            sequences = self._answers(rows, processor)
        else:
            sequences = self._plain(rows, processor, limit)
        cut = [(tokens[:limit], labels[:limit]) for tokens, labels in sequences]
        # the first token is predicted by none; a row that is cut before its answer teaches nothing
        kept = [(tokens, labels) for tokens, labels in cut if any(x != IGNORED for x in labels[1:])]
        if not kept:
            raise GraftError(
                "tokens to learn from",
                f"none within {limit} tokens of any row",
                "raise --max-length, or check the rows",
            )
        return with_columns(
            {
                "input_ids": [tokens for tokens, _ in kept],
                "attention_mask": [[1] * len(tokens) for tokens, _ in kept],
                "labels": [labels for _, labels in kept],
            }
        )

    def _answers(self, rows: Dataset, processor: Any) -> Sequences:
        prompts, answers = texts(rows, self.columns.text), texts(rows, str(self.columns.label))
        end = _end(processor)
        asked = _ids(processor, prompts, special=True)
        if processor.eos_token_id is not None:  # some tokenizers close every text: the answer goes on
            asked = [ids[:-1] if ids and ids[-1] == processor.eos_token_id else ids for ids in asked]
        replied = [ids + end for ids in _ids(processor, answers, special=False)]
        return [(q + a, [IGNORED] * len(q) + a) for q, a in zip(asked, replied, strict=True)]

    def _plain(self, rows: Dataset, processor: Any, limit: int) -> Sequences:
        """Whole texts; one longer than the limit becomes several rows, so that nothing is lost."""
        out = []
        for ids in _ids(processor, texts(rows, self.columns.text), special=True):
            end = _end(processor)
            whole = ids if not end or ids[-1:] == end else ids + end
            out += [(whole[i : i + limit], whole[i : i + limit]) for i in range(0, len(whole), limit)]
        return out

    def collator(self, processor: Any, model: Any) -> Collator:
        needs_pad_token(processor)
        return lambda rows: pad(processor, rows, labels="token")

    def items(self, labels: Tensor) -> Tensor:
        return labels[:, 1:].ne(IGNORED).sum()

    def shrink(self, logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        return kept_tokens(first(logits)[:, :-1], labels[:, 1:])

    def metrics(self, kept: Any, labels: Any) -> dict[str, float]:
        predicted, nll = kept
        return metrics.language(predicted, nll, labels[:, 1:])

    def decode(self, logits: Any, rows: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        raise NotImplementedError("a language model answers by `model.generate`")


def kept_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token and the negative log-likelihood of the label at each position, from logits [batch,
    positions, vocab]."""
    logits = logits.float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return logits.argmax(-1), nll


def needs_pad_token(processor: Any) -> None:
    """A tokenizer without a padding token pads with the end: the mask keeps those positions out of everything."""
    if processor.pad_token_id is None:
        if processor.eos_token is None:
            raise GraftError(
                "batches of texts", "a tokenizer with neither a padding nor an end token", "set tokenizer.pad_token"
            )
        processor.pad_token = processor.eos_token


def _end(processor: Any) -> list[int]:
    return [] if processor.eos_token_id is None else [processor.eos_token_id]


def _ids(processor: Any, written: list[str], special: bool) -> list[list[int]]:
    return [list(ids) for ids in processor(written, add_special_tokens=special)["input_ids"]]


def chat(processor: Any, messages: Sequence[Mapping[str, Any]], number: int) -> tuple[list[int], list[int]]:
    """Tokens of a conversation by the tokenizer's own template, and labels at the assistant's answers only.

    A template that marks answers ({% generation %}) is asked. One that does not is run on the beginnings of the
    conversation: what it adds from "the assistant is to speak" to the end of a turn is the answer. GraftError
    where beginnings do not agree.
    """
    turns = [{k: v for k, v in m.items() if v is not None} for m in messages]
    turns = [_usual_names(turn) for turn in turns]
    if not getattr(processor, "chat_template", None):
        raise GraftError(
            "chat rows",
            "a tokenizer without a chat template",
            "set tokenizer.chat_template, or use prompt and completion columns",
        )
    if not any(turn.get("role") == "assistant" for turn in turns):
        raise GraftError("answers of the assistant", f"none in row {number}", "give messages with the role 'assistant'")
    try:
        if "{% generation" in processor.chat_template or "{%- generation" in processor.chat_template:
            out = processor.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
            tokens, answered = list(out["input_ids"]), list(out["assistant_masks"])
            starts = sum(bool(a) and (i == 0 or not answered[i - 1]) for i, a in enumerate(answered))
            replies = sum(
                t.get("role") == "assistant" and turns[i - 1].get("role") != "assistant"
                for i, t in enumerate(turns)
                if i
            )
            if starts < replies:  # a mark that ends in a space ends nowhere: transformers then marks all that follows
                raise GraftError(
                    f"the answers in row {number}",
                    f"{starts} marked stretches for {replies} answers",
                    "let {% endgeneration %} follow the end token directly",
                )
            return tokens, [t if a else IGNORED for t, a in zip(tokens, answered, strict=True)]
        return _by_beginnings(processor, turns, number)
    except GraftError:
        raise
    except Exception as error:  # a template is a program of the model's author; whatever it raises is about the row
        raise GraftError(
            f"the chat template on row {number}", f"{type(error).__name__}: {error}", "check the roles of the messages"
        ) from error


def _by_beginnings(processor: Any, turns: list[dict[str, Any]], number: int) -> tuple[list[int], list[int]]:
    tokens = list(processor.apply_chat_template(turns, return_dict=True)["input_ids"])
    labels = [IGNORED] * len(tokens)
    for i, turn in enumerate(turns):
        if turn.get("role") != "assistant":
            continue
        asked = list(
            processor.apply_chat_template(turns[:i], add_generation_prompt=True, return_dict=True)["input_ids"]
        )
        replied = list(processor.apply_chat_template(turns[: i + 1], return_dict=True)["input_ids"])
        while len(replied) > len(asked) and replied != tokens[: len(replied)]:
            replied.pop()  # a closing token that only the end of a conversation has
        if tokens[: len(asked)] != asked or len(replied) <= len(asked):
            raise GraftError(
                f"the answers in row {number}",
                "a chat template that writes a beginning differently from the whole",
                "mark the answers in the template with {% generation %} ... {% endgeneration %}",
            )
        labels[len(asked) : len(replied)] = tokens[len(asked) : len(replied)]
    return tokens, labels


def _usual_names(turn: dict[str, Any]) -> dict[str, Any]:
    """{"from": "gpt", "value": ...} as {"role": "assistant", "content": ...}."""
    if "role" in turn or "from" not in turn:
        return turn
    roles = {"human": "user", "gpt": "assistant", "bot": "assistant"}
    return {"role": roles.get(turn["from"], turn["from"]), "content": turn.get("value", "")}
