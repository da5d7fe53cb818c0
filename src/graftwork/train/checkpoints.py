"""The checkpoints of a run: which one is whole, and whether it belongs to the job that wants to go on from it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..core.errors import GraftError

FOLDER = "checkpoints"
SETTINGS = "settings.json"
STATE = "trainer_state.json"


def last_whole(folder: Path, processes: int) -> Path | None:
    """The newest checkpoint that a kill did not cut short, or None. The Trainer writes its state last."""
    if not folder.is_dir():
        return None
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return next((path for _, path in sorted(found, reverse=True) if is_whole(path, processes)), None)


def is_whole(checkpoint: Path, processes: int) -> bool:
    """Whether everything is there that going on needs."""
    random = ["rng_state.pth"] if processes <= 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    needed = ["adapter/adapter.json", "adapter/adapter.safetensors", "scheduler.pt", *random]
    if not all((checkpoint / name).is_file() for name in needed):
        return False
    if not any((checkpoint / name).exists() for name in ("optimizer.pt", "optimizer.bin", "optimizer_0")):
        return False
    return read_state(checkpoint) is not None


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """The Trainer's state, or None where it is missing or cut short."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def remember(folder: Path, identity: dict[str, Any]) -> None:
    """Write down what decides the run's result."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{SETTINGS}.{os.getpid()}"
    temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    temporary.replace(folder / SETTINGS)


def check_same(folder: Path, identity: dict[str, Any]) -> None:
    """GraftError where the interrupted run had other settings: going on would mix two runs."""
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise GraftError(
            f"go on from {str(folder)!r}", "checkpoints without their settings", "start again with --overwrite"
        ) from None
    now = json.loads(json.dumps(identity))  # tuples as lists, as in the file
    different = sorted(key for key in {*_flat(before), *_flat(now)} if _flat(before).get(key) != _flat(now).get(key))
    if different:
        key = different[0]
        raise GraftError(
            f"go on from {str(folder)!r}",
            f"the interrupted run had {key} = {_flat(before).get(key)!r}, now it is {_flat(now).get(key)!r}",
            "give the same settings, or start again with --overwrite",
        )


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
