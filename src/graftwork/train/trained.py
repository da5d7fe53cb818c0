"""Using a trained adapter: open it on its backbone, predict, evaluate, write a merged model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from .. import combinators, methods  # noqa: F401  (they register the names that a file uses)
from ..core.adapter import Adapter
from ..core.errors import GraftError
from ..expressions.algebra import A
from ..expressions.mixing import mixing
from ..grafting.graft import activate
from ..grafting.merge import forget, merge
from ..grafting.moments import context
from ..store.hub import locate
from . import backbone, tasks
from .described import metadata_of
from .row_tasks import marked, names_in
from .several import Named, by_name, load_named, over, whole
from .tasks import Task, Tokens
from .trainer import GraftTrainer

BATCH = 32


@dataclass(frozen=True)
class Trained:
    """An adapter on its backbone, in evaluation mode, on the accelerator where there is one."""

    model: torch.nn.Module
    adapter: Adapter
    task: Task
    processor: Any

    def predict(
        self, rows: Sequence[dict[str, Any]], batch: int = BATCH, max_new_tokens: int = 64
    ) -> list[dict[str, Any]]:
        """One prediction for each row {column: value}: label and score, value, tags, or generated text."""
        out: list[dict[str, Any]] = []
        with torch.inference_mode():
            for i in range(0, len(rows), batch):
                out += self._predict(list(rows[i : i + batch]), max_new_tokens)
        return out

    def _predict(self, rows: list[dict[str, Any]], max_new_tokens: int) -> list[dict[str, Any]]:
        with self._tasks(rows):
            return self._answers(rows, max_new_tokens)

    def _answers(self, rows: list[dict[str, Any]], max_new_tokens: int) -> list[dict[str, Any]]:
        if self.task.name in ("causal", "seq2seq"):
            return [{"text": text} for text in self._generated(rows, max_new_tokens)]
        if self.task.name == "masked":
            return self._filled(rows)
        if isinstance(self.task, Tokens):
            words = tasks.tokens.word_lists(Dataset.from_list(rows), self.task.columns.text)
            encoding = self.processor(
                words, is_split_into_words=True, truncation=True, padding=True, return_tensors="pt"
            )
            return self.task.tag_words(self._logits(dict(encoding)), encoding, words)
        encoded = self.task.encode(Dataset.from_list(rows), self.processor, labelled=False)
        batch = self.task.collator(self.processor, self.model)(list(encoded))
        return self.task.decode(self._logits(batch), {})

    def _tasks(self, rows: list[dict[str, Any]]) -> AbstractContextManager[None]:
        """Inside this block, the context says what task each row is of, if the adapter learnt something for each."""
        column = self.task.columns.task
        if column is None:
            return nullcontext()
        return context(self.model, task=names_in(Dataset.from_list(rows), column))

    def _logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**self._moved(batch)).logits
        return logits.float().cpu()

    def _moved(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in batch.items()}

    def _generated(self, rows: list[dict[str, Any]], max_new_tokens: int) -> list[str]:
        """What the model writes, greedily, after each row's text or conversation."""
        out = []
        for row in rows:  # one by one: the padding of a batch would change positions in some models
            text = row[self.task.columns.text]
            if isinstance(text, list):
                inputs = self.processor.apply_chat_template(
                    text, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            else:
                inputs = self.processor(text, return_tensors="pt")
            inputs = {k: v for k, v in dict(inputs).items() if k in ("input_ids", "attention_mask")}
            end, seq2seq = self.processor.eos_token_id, self.task.name == "seq2seq"
            if not seq2seq and end is not None and inputs["input_ids"][0, -1] == end:
                inputs = {k: v[:, :-1] for k, v in inputs.items()}
            pad = self.processor.pad_token_id if self.processor.pad_token_id is not None else end
            with self._tasks([row]):
                ids = self.model.generate(  # type: ignore[operator]
                    **self._moved(inputs),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=pad,
                )
            fresh = ids[0] if seq2seq else ids[0, inputs["input_ids"].shape[1] :]
            out.append(self.processor.decode(fresh, skip_special_tokens=True))
        return out

    def _filled(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The five likeliest words for each mask."""
        mask = self.processor.mask_token
        written = [str(row[self.task.columns.text]) for row in rows]
        for text in written:
            if mask not in text:
                raise GraftError(f"fill {text[:60]!r}", "no mask in it", f"write {mask} where a word is to be found")
        batch = dict(self.processor(written, truncation=True, padding=True, return_tensors="pt"))
        likely = self._logits(batch).softmax(-1)
        out = []
        for i in range(len(written)):
            places = (batch["input_ids"][i] == self.processor.mask_token_id).nonzero().flatten().tolist()
            best = [likely[i, p].topk(min(5, likely.shape[-1])) for p in places]
            words = [[self.processor.decode([t]).strip() for t in b.indices.tolist()] for b in best]
            out.append({"words": words, "scores": [b.values.tolist() for b in best]})
        return out

    def evaluate(self, rows: Dataset, batch: int = BATCH) -> dict[str, float]:
        """The task's scores on labelled rows, computed as they are in training."""
        from .run import _scores

        encoded = marked(self.task.encode(rows, self.processor), rows, self.task, self.adapter.methods)
        with tempfile.TemporaryDirectory() as folder:
            trainer = GraftTrainer(
                adapter=self.adapter,
                task=self.task,
                model=self.model,
                args=TrainingArguments(
                    output_dir=folder,
                    per_device_eval_batch_size=batch,
                    disable_tqdm=True,
                    report_to="none",
                    remove_unused_columns=False,
                    label_names=["labels"],
                    dataloader_pin_memory=torch.cuda.is_available(),
                ),
                data_collator=self.task.collator(self.processor, self.model),
                eval_dataset=encoded,
                compute_metrics=lambda p: self.task.metrics(p.predictions, p.label_ids),
                preprocess_logits_for_metrics=self.task.shrink,
                callbacks=[],
            )
            return _scores(trainer)

    def with_columns(self, text: str | None, pair: str | None, label: str | None) -> Trained:
        """The same with other column names, for data that names them otherwise."""
        named = self.task.columns
        columns = replace(named, text=text or named.text, pair=pair or named.pair, label=label or named.label)
        return replace(self, task=replace(self.task, columns=columns))

    def write_merged(self, folder: Path, of: str | None = None) -> None:
        """Merge the adapter into the weights and write a plain transformers folder. The adapters are gone from the
        model afterwards. of: the task, of an adapter that learnt something for each of several."""
        if of is not None:
            context(self.model, task=of)
        merge(self.model)
        forget(self.model)
        for key, value in self.task.config().items():
            setattr(self.model.config, key, value)
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.processor.save_pretrained(folder)


def open_trained(
    folder: str | Path, name: str | None = None, more: Sequence[str | Path] = (), expression: str | None = None
) -> Trained:
    """The adapter of this folder on its backbone. name: the backbone's folder or hub name, where it is not what
    the file says.

    more: folders of other adapters of the same backbone, each called as its folder: those that `expression` names, or that the
        adapter mixes.
    expression: what is active, e.g. "0.5*sst2 + 0.5*imdb"; None is the adapter of `folder`, whose task is the model's.
    """
    places = [locate(place) for place in (folder, *more)]
    folders = by_name(places)
    e = A(places[0].name) if expression is None else over(expression, folders)
    trained, named = open_named(folders, name)
    if more and expression is None and mixing(trained.adapter) is None:
        raise GraftError("several adapters", "no expression says what is active", "add --adapter 'a >> b'")
    activate(trained.model, whole(e, named))
    return trained


def open_named(folders: Mapping[str, str], name: str | None = None) -> tuple[Trained, dict[str, Named]]:
    """The backbone of the first of these folders with all of their adapters, and what was loaded by name. name: as above."""
    first, folder = next(iter(folders.items()))
    metadata = metadata_of(folder).get("metadata", {})
    if "task" not in metadata:
        do = "only adapters of graftwork train have one; use gw.load"
        raise GraftError(f"the adapter {folder!r}", "no task in adapter.json", do)
    task = tasks.from_json(metadata["task"])
    try:
        loaded = backbone.load(name or metadata["backbone"], task)
    except GraftError as error:
        if name is None:
            raise GraftError(error.asked, error.found, "name the backbone with --backbone") from error
        raise
    named = load_named(loaded.model, folders)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(loaded.model.to(device).eval(), named[first].adapter, task, loaded.processor), named


def rows_of(
    task: Task, texts: Sequence[Any], pairs: Sequence[Any] | None = None, of: str | None = None
) -> list[dict[str, Any]]:
    """Texts as rows with the task's column names. of: which of its tasks they are of, where the adapter has several."""
    columns = task.columns
    if columns.pair and pairs is None:
        raise GraftError("a prediction for a pair", "one text only", "give the second with --pair")
    if (columns.task is None) != (of is None):
        found = "none for each task" if columns.task is None else "several tasks, and none is named"
        raise GraftError("a prediction of a task", f"an adapter with {found}", "give --of-task where it has tasks")
    rows = [{columns.text: text} | ({columns.task: of} if columns.task else {}) for text in texts]
    if columns.pair and pairs is not None:
        for row, pair in zip(rows, pairs, strict=True):
            row[columns.pair] = pair
    return rows
