"""The main job: from a backbone, a data set and a method to a trained adapter, with `transformers.Trainer`.

    from graftwork.train import DataSettings, TrainSettings, train
    result = train(TrainSettings("roberta-base", "adapters/mine", DataSettings("my.csv"), method="lora(r=8)"))

Everything heavy is imported when it is first used, so that the command line can read the settings at no cost.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .settings import DataSettings, FitSettings, TrainSettings

if TYPE_CHECKING:
    from .run import Result, train
    from .trained import Trained, open_trained

_LAZY = {"Result": "run", "train": "run", "Trained": "trained", "open_trained": "trained"}

__all__ = ["DataSettings", "FitSettings", "Result", "TrainSettings", "Trained", "open_trained", "train"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
