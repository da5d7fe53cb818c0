"""Files of kohya, diffusers and pyreft with bytes, keys and values changed at random: a GraftError or an adapter, never else."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import graftwork as gw
from graftwork.grafting.root import is_grafted

from .peers import model
from .test_diffusion import kohya, new_names, updates, write
from .test_pyreft import folder
from .unets import UNet, made

VALUES = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    10**400,
    0.5,
    "",
    "q_proj",
    "f1+l1",
    "all",
    [],
    [1],
    {},
    {"a": 1},
    "x.output",
    "../a/b.output",
]
ODD = [
    torch.ones(0),
    torch.ones(()),
    torch.ones(2, 2, 2),
    torch.ones(3, dtype=torch.int64),
    torch.ones(2, 3, dtype=torch.complex64),
]


def _value(r: random.Random, data: object) -> object:
    """The same JSON with one value somewhere in it changed."""
    if isinstance(data, dict) and data and r.random() < 0.9:
        key = r.choice(sorted(data))
        return {k: _value(r, v) if k == key else v for k, v in data.items() if k != key or r.random() < 0.9}
    if isinstance(data, list) and data and r.random() < 0.9:
        at = r.randrange(len(data))
        return [_value(r, v) if i == at else v for i, v in enumerate(data)]
    return r.choice(VALUES)


def _tensors(r: random.Random, data: dict[str, Tensor]) -> dict[str, Tensor]:
    key, out = r.choice(sorted(data)), dict(data)
    value, what = out.pop(key), r.random()
    if what < 0.4:
        out[key] = r.choice([*ODD, value.flatten()[:1], value.double(), value.flatten(), value + 7]).clone()
    elif what < 0.7:
        out[r.choice([key + "x", key.replace("down", "up"), key.replace("_0", "_1"), "lora_unet_." + key])] = value
    return out


def _bytes(r: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(r.randint(1, 4)):
        data[r.randrange(len(data))] = r.randrange(256)
    path.write_bytes(data[: r.randint(0, len(data))] if r.random() < 0.3 else data)


def _attempt(r: random.Random, m: torch.nn.Module, path: Path) -> None:
    before = [type(x) for x in m.modules()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gw.load(m, path, "a", partial=r.random() < 0.3)
    except gw.GraftError:
        assert not is_grafted(m)
    else:
        gw.remove(m, "a")
    assert [type(x) for x in m.modules()] == before


@pytest.mark.parametrize("seed", range(150))
def test_files_of_tensors(seed: int, tmp_path: Path) -> None:
    r, m = random.Random(seed), made(UNet)
    given = updates(m)
    header = {
        "unet.r": 2,
        "unet.lora_alpha": 3,
        "unet.alpha_pattern": {"conv_in": 1},
        "unet.target_modules": sorted(given),
    }
    as_kohya = r.random() < 0.5
    tensors, texts = (kohya(given), {}) if as_kohya else (new_names(given), {"lora_adapter_metadata": header})
    texts = {k: json.dumps(_value(r, v) if r.random() < 0.5 else v) for k, v in texts.items()}
    path = write(tmp_path / "a.safetensors", _tensors(r, tensors) if r.random() < 0.7 else tensors, **texts)
    if r.random() < 0.3:
        _bytes(r, path)
    _attempt(r, m, path)


@pytest.mark.parametrize("seed", range(100))
def test_intervention_folders(seed: int, tmp_path: Path) -> None:
    r, m = random.Random(seed), model("llama")
    place, _ = folder(tmp_path / "reft", r.choice(["Loreft", "Noreft", "Direft", "Lobireft"]), r.random() < 0.5)
    for name in ("config.json", "args.json"):
        if r.random() < 0.5:
            (place / name).write_text(json.dumps(_value(r, json.loads((place / name).read_text()))))
    path = r.choice(sorted(place.glob("*.bin")))
    if r.random() < 0.5:
        torch.save(_tensors(r, torch.load(path)), path)
    if r.random() < 0.3:
        _bytes(r, path)
    _attempt(r, m, place)
