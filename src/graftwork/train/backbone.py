"""Loading the frozen model and what turns rows into its inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from ..core.errors import GraftError
from ..core.method import Method, flatten
from ..sites.anatomy import anatomy
from ..sites.where import select
from .tasks import Task


@dataclass(frozen=True)
class Backbone:
    """A loaded backbone. processor: its tokenizer or image processor;  fresh: parameters that the checkpoint did
    not bring."""

    name: str
    model: nn.Module
    processor: Any
    fresh: tuple[str, ...]


def config_of(name: str) -> PretrainedConfig:
    """The config of a folder or a hub name. GraftError where there is none."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        folder = Path(name).expanduser()
        if folder.is_dir():
            found = "no config.json in the folder" if not (folder / "config.json").is_file() else _short(error)
        else:
            found = f"no folder of that name, and from the hub: {_short(error)}"
        raise GraftError(
            f"the backbone {name!r}", found, "give a folder with a transformers model, or its name on the hub"
        ) from error


def load(name: str, task: Task) -> Backbone:
    """The backbone with the head that the task needs. GraftError where transformers has no such head for it."""
    config = config_of(name)
    for key, value in task.config().items():
        setattr(config, key, value)
    auto = getattr(transformers, task.auto)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(
            task.seed
        )  # what the checkpoint does not bring starts the same in every process, now and later
        try:
            # a head of another size in the checkpoint is replaced by a fresh one, which is then trained
            model, info = auto.from_pretrained(
                name, config=config, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (OSError, ValueError) as error:
            raise GraftError(
                f"load {name!r} for {task.name}", _short(error), "choose another backbone or --task"
            ) from error
        processor = _processor(name, task)
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    fresh = tuple(sorted({*info["missing_keys"], *mismatched} & {n for n, _ in model.named_parameters()}))
    return Backbone(name, model, processor, fresh)


def of_class(name: str, cls: str | None = None, like: nn.Module | None = None) -> nn.Module:
    """The model of a folder or hub name as the transformers class `cls`, None: the one it was saved as; in evaluation mode.

    like: a model whose labels it takes.
    """
    config = config_of(name)
    chosen = cls or next(iter(getattr(config, "architectures", None) or ()), "")
    made = getattr(transformers, chosen, None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        found = f"{chosen!r}, no class of transformers" if chosen else "no class in its config"
        raise GraftError(f"load {name!r}", found, "choose a checkpoint that transformers wrote")
    if like is not None:
        for key in ("id2label", "label2id"):
            setattr(config, key, getattr(like.config, key))
    try:
        with quiet():
            model: nn.Module = made.from_pretrained(name, config=config, ignore_mismatched_sizes=like is not None)
    except (OSError, ValueError, RuntimeError) as error:
        raise GraftError(f"load {name!r} as {chosen}", _short(error), "choose another backbone") from error
    return model.eval()


def _processor(name: str, task: Task) -> Any:
    kind = AutoImageProcessor if task.name == "image" else AutoTokenizer
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "image processor" if task.name == "image" else "tokenizer"
        raise GraftError(
            f"the {what} of {name!r}", _short(error), f"put the {what}'s files into the backbone's folder"
        ) from error


def with_fresh(model: nn.Module, methods: Sequence[Method], fresh: Sequence[str]) -> list[Method]:
    """The methods, and a `Full` for the freshly initialised modules that neither what `replaces` them nor the task head's own
    `Full` train.

    What a checkpoint did not bring is random: frozen, it would be noise that no file holds.
    """
    found = anatomy(model)
    trained = {site.path for site in found.of("head")}
    for method in methods:
        if method.replaces:
            trained |= {site.path for site in select(found, method.at, method.layers)}
    left = sorted({name.rpartition(".")[0] for name in fresh} - trained)
    if not left:
        return list(methods)
    return [*methods, *flatten(f"full(at={_exactly(left)!r})")]


def _exactly(paths: Sequence[str]) -> str:
    return f"/^(?:{'|'.join(re.escape(path) for path in paths)})$/"


def on_meta(name: str) -> nn.Module:
    """The model of a folder, a hub name or a model type, with its own head, on the meta device: shapes without
    memory."""
    if name in CONFIG_MAPPING and not Path(name).expanduser().is_dir():
        config = CONFIG_MAPPING[name]()
    else:
        config = config_of(name)
    architectures = [getattr(transformers, a, None) for a in getattr(config, "architectures", None) or ()]
    with torch.device("meta"), quiet():
        if architectures and architectures[0] is not None:
            model: nn.Module = architectures[0](config)
        else:
            model = AutoModel.from_config(config)
    return model


class quiet:
    """Inside this block, transformers prints neither progress nor reports."""

    def __enter__(self) -> None:
        self.level, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
