"""Every registered method goes through the main job: trained, opened again, and resumed to the same bits."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import graftwork.train.run  # noqa: F401  (registers all methods)
from graftwork.core.method import REGISTRY
from graftwork.train import DataSettings, FitSettings, TrainSettings, open_trained, train

# the others sit on any backbone
KINDS = {"llama_adapter": "llama", "dyt": "llama", "perft_e": "mixtral"}
KINDS |= dict.fromkeys(("batch_norm", "conv_adapter", "parallel_conv", "series_conv"), "resnet")
KINDS |= dict.fromkeys(("vpt", "pruned_vpt", "blackvip"), "vit")
# whose file is the adapter of another method, with so many times the parameters that were trained
STORED = {"corda": ("lora", 2)} | dict.fromkeys(("loraplus", "split_merge", "adamix", "ortho"), ("bottleneck", 1))
FIT = FitSettings(steps=8, batch=8, lr=5e-3, evaluate_every=4, keep_checkpoints=True)


def text(name: str) -> str:
    """The method with its defaults; a combinator around a bottleneck, which has nothing special about it."""
    if name == "prompt":
        return "prompt(length=4)"  # its 100 tokens are more than the tiny model's 64 positions
    if name == "road":
        return "road(group=8)"  # groups of 64 features are more than the tiny model has
    if name == "trainable_tokens":
        return "trainable_tokens(tokens=(5, 6, 7, 8))"  # which tokens is for the user to say
    if name == "vblora":
        return "vblora(vectors=32, length=8)"  # its 256 do not divide the tiny model's widths
    if name == "eigenlorax":
        return "eigenlorax(k=8, extra=4)"
    if name == "k_adapter":
        return "k_adapter(states='0,1', d=8, heads=2, d_ff=16)"  # the tiny model has no block 23
    if name == "moa_hetero":
        return (
            "moa_hetero(of=[lora(at='q, v'), bottleneck(reduction=4, at='mlp')])"  # the published experts want a gate
        )
    if name == "qlora":
        return "qlora(r=8)"  # the tiny model's weights have no rank of 64
    if name == "corda":
        return "corda(r=4, alpha=4)"  # the tiny model's layers have no 128 directions
    if name == "blackvip":
        return "blackvip(features=12, src_dim=32, grid=1, stages=3, encoder='pixels')"  # images of 8 pixels
    if name == "das":
        return "das(k=1, turns=2, per_call=2)"  # the tiny model has two blocks
    needs = [f.name for f in dataclasses.fields(REGISTRY[name]) if f.default is dataclasses.MISSING]
    return f"{name}({', '.join(f'{option}=bottleneck(reduction=4)' for option in needs)})"


def special(name: str) -> bool:
    """Whether training does more with the method than step its parameters, or its file or backbone is of another kind."""
    bases = REGISTRY[name].__mro__[:-2]  # without Method and object
    own = {field for base in bases for field in vars(base)} & {"needs", "fold", "step", "begin", "groups"}
    return bool(own) or name in KINDS or name in STORED


# what mixes other adapters is trained beside them: test_members. Those with nothing special are left to `make slow`, but for these
NAMES = sorted(name for name, made in REGISTRY.items() if not made.mixes)
QUICK = {"bottleneck", "full", "generated", "ladder", "mixture", "prompt", "soka"} | set(filter(special, NAMES))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_a_method_is_trained_opened_and_resumed(name: str, backbones: Callable[[str], Path], tmp_path: Path) -> None:
    kind = KINDS.get(name, "bert")
    made = {"llama": tiny.alphabets, "resnet": tiny.pictures, "mixtral": tiny.alphabets, "bert": tiny.feelings}
    rows = [] if kind == "vit" else made[kind](80)
    data = "digits" if kind == "vit" else str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
    backbone, out = backbones(kind), tmp_path / "out"
    job = TrainSettings(str(backbone), str(out), DataSettings(data), text(name), name="it", fit=FIT)
    trained = train(job)
    whole = load_file(out / "adapter.safetensors")
    again = open_trained(out)
    stored, times = STORED.get(name, (name, 1))
    assert again.adapter.methods[0].name == stored and again.adapter.num_parameters <= times * trained.parameters
    if rows:
        assert len(again.predict([rows[0] if kind == "resnet" else {"text": "a b c"}], max_new_tokens=2)) == 1
    shutil.rmtree(out / "checkpoints" / "checkpoint-8")
    for file in ("adapter.json", "adapter.safetensors", "README.md"):
        (out / file).unlink()
    train(replace(job, resume=True))
    resumed = load_file(out / "adapter.safetensors")
    assert resumed.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(resumed[key], whole[key])] == []
