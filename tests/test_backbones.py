"""Every method on every kind of backbone: what runs, and what is refused with which reason. docs/backbones.md is the table.

python tests/test_backbones.py    # writes docs/backbones.md
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import attention_models
import conv_models
import pytest
import torch
import transformers
from conformance.settings import SETTINGS
from torch import Tensor, nn

import graftwork as gw
from graftwork.core.errors import GraftError
from graftwork.core.method import REGISTRY

PAGE = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
DRAWS = 30  # training passes after which what is drawn has been
# one method of each kind: these are tried in every run, all of them by `make slow`
KINDS = (
    "lora", "dora", "oft", "ia3", "bitfit", "diff_pruning", "losia", "bottleneck", "loreft", "ssf", "conv_adapter", "prefix",
    "laplacian", "prompt", "blackvip", "ladder", "s2a", "coda", "das", "mixture", "mov", "adamix", "generated", "unipelt",
)  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """A small random model of a kind, and a batch."""

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    decodes: bool = False


def _of(title: str, name: str, decodes: bool = False) -> Backbone:
    return Backbone(title, lambda: attention_models.make(name), lambda: attention_models.batch(name), decodes)


BACKBONES = {
    "bert": _of("BERT", "bert-classifier"),
    "llama": _of("Llama, grouped queries", "llama", decodes=True),
    "t5": _of("T5", "t5", decodes=True),
    "vit": _of("ViT", "vit"),
    "resnet": Backbone("ResNet", conv_models.resnet, lambda: {"pixel_values": conv_models.images(size=16)}),
    "wav2vec2": _of("Wav2Vec2", "wav2vec2"),
    "whisper": _of("Whisper", "whisper", decodes=True),
    "mixtral": _of("Mixtral, experts", "mixtral", decodes=True),
}


# where the conformance table's options are for other widths
OPTIONS: dict[str, dict[str, Any]] = {
    "ladder": {"r": 4},
    "moa_hetero": {"of": (gw.LoRA(r=2, at="self.q, self.v"), gw.Bottleneck(d=4, position="parallel", at="mlp"))},
    "blackvip": {"features": 12, "src_dim": 512, "grid": 4, "stages": 2, "encoder": "pixels", "norm": "instance"},
}


def methods() -> dict[str, tuple[gw.Method, ...]]:
    """All by name, each small: the options of its first row in the conformance table, or, of a preset, its own."""
    out = {}
    for name in gw.methods():
        if not getattr(REGISTRY.get(name), "__module__", "graftwork").startswith("graftwork"):
            continue  # the examples have methods, too
        if getattr(REGISTRY.get(name), "mixes", False):
            continue  # it joins adapters that are there: tests/conformance/test_mixing.py
        if name in REGISTRY:
            first = next(iter(SETTINGS.get(name, ())), None)
            options = dict(OPTIONS.get(name) or (first.options if first else {}))
            options.pop("at", None)  # chosen for one host
            out[name] = (REGISTRY[name](**options),)
        else:
            out[name] = gw.parse_methods(name)
    return out


METHODS = methods()


def loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """One whose gradient reaches every output."""
    out = attention_models.run(model, inputs, grad=True).float()
    return (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(11))).pow(2).mean()


@cache
def tried(name: str, backbone: str) -> str:
    """What comes of it: "" where it runs and decodes with a cache, "no cache", or "refused: " and why. An assertion fails where it
    runs and is wrong."""
    kind = BACKBONES[backbone]
    model, inputs = kind.make(), kind.inputs()
    before = attention_models.run(model, inputs)
    outcome = ""
    try:
        adapter = gw.graft(model, METHODS[name], "a", head=False, seed=0)
        if any("calibrate" in m.needs for m in adapter.methods):
            gw.calibrate(model, [inputs], loss)
        attention_models.scatter(adapter, std=0.05)
        model.train()
        trained(model, adapter, inputs)
        model.eval()
        changed = attention_models.run(model, inputs)
        assert torch.isfinite(changed).all() and not torch.equal(changed, before), "it changes nothing"
    except GraftError as refusal:
        outcome = f"refused: {refusal.found}"
    else:
        if kind.decodes:
            outcome = decoded(model, inputs)
    for a in list(gw.adapters(model)):
        gw.remove(model, a)
    assert torch.equal(attention_models.run(model.eval(), inputs), before), "the backbone is not what it was"
    return outcome


def trained(model: nn.Module, adapter: gw.Adapter, inputs: dict[str, Any]) -> None:
    """Everything that trains gets a gradient, in as many passes as that takes; nothing else does. (Of experts, some may go without.)"""
    own = dict(adapter.named_parameters())
    idle = set(own)
    for _ in range(DRAWS):
        (loss(model, inputs) + gw.auxiliary_loss(model)).backward()
        idle = {n for n in idle if own[n].grad is None or not own[n].grad.any()}
        if not idle:
            break
    assert len(idle) < len(own), "nothing is trained"
    mine = {id(p) for p in own.values()}
    assert not [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in mine]


def decoded(model: Any, inputs: dict[str, Any]) -> str:
    """Whether greedy decoding with a cache gives what it gives without one."""
    # some methods edit the last tokens of the prompt, which they could not tell from new ones without a cache
    prompt = inputs.get("attention_mask", torch.ones(2, 6)).sum(1).long()
    with gw.context(model, prompt_length=prompt):
        bare = attention_models.decode(model, inputs, 4, use_cache=False)
        try:
            cached = attention_models.decode(model, inputs, 4, use_cache=True)
        except GraftError:
            return "no cache"
    assert torch.allclose(cached, bare, atol=1e-4), "a cache changes what is generated"
    return ""


def page() -> str:
    """The table, with the reasons under it."""
    reasons: dict[str, int] = {}
    rows = []
    for name in METHODS:
        cells = []
        for backbone in BACKBONES:
            found = tried(name, backbone)
            if found.startswith("refused: "):
                why = re.sub(r"\s+", " ", found.removeprefix("refused: "))
                found = f"[{reasons.setdefault(why, len(reasons) + 1)}]"
            cells.append(found or "yes")
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    head = ["method", *(b.title for b in BACKBONES.values())]
    return "\n".join(
        [
            "# Which method runs on which backbone",
            "",
            "Written by `python tests/test_backbones.py`, compared by `make slow`. Each cell is a small random model on which the",
            "method was grafted, trained (gradients reach the adapter and nothing else), run, decoded with and without a key-value",
            "cache where the model generates, and removed, after which the model computes the same bits as before.",
            "no cache: it runs, and refuses to decode with one. A number: refused when grafted or in the first pass, for the reason",
            "below.",
            "",
            f"| {' | '.join(head)} |",
            f"|{' --- |' * len(head)}",
            *rows,
            "",
            *(f"[{n}] {why}\n" for why, n in reasons.items()),
        ]
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", KINDS)
def test_a_method_of_each_kind_on_every_backbone(name: str, backbone: str) -> None:
    row = re.search(rf"^\| `{name}` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None, f"{name} is not in {PAGE.name}: python {Path(__file__).name} writes it"
    cell = row[1].split(" | ")[list(BACKBONES).index(backbone)]
    found = tried(name, backbone)
    assert cell.startswith("[") if found.startswith("refused") else cell == (found or "yes"), found


@pytest.mark.slow
def test_the_page_is_what_runs() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page(), encoding="utf-8")
