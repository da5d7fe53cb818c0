"""A small model, a saved adapter, and a look at everything that must not change."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import graftwork as gw


@functools.cache
def _bert(labels: int, seed: int, hidden: int) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=48,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
        num_labels=labels,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.BertForSequenceClassification(config).eval()


def bert(labels: int = 2, seed: int = 0, hidden: int = 24) -> nn.Module:
    """A new copy of a tiny BERT with a head."""
    return copy.deepcopy(_bert(labels, seed, hidden))


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(5, 48, (3, 7), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(input_ids=ids).logits


@torch.no_grad()
def trained(model: nn.Module, name: str = "a", methods: Any = None, seed: int = 0, **given: Any) -> Any:
    """An adapter away from its initial values."""
    adapter = gw.graft(model, methods if methods is not None else gw.LoRA(r=3), name, seed=seed, **given)
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return adapter


def saved(folder: Path, **given: Any) -> Path:
    """A folder with a saved adapter."""
    model = bert()
    trained(model, **given)
    gw.save(model, "a", folder)
    return folder


def look(model: nn.Module) -> dict[str, Any]:
    """All of a model that a failed call must leave alone."""
    return {
        "state": {k: hashlib.sha256(v.numpy(force=True).tobytes()).hexdigest() for k, v in model.state_dict().items()},
        "parameters": {k: (id(p), p.requires_grad) for k, p in model.named_parameters()},
        "modules": {k: (id(m), type(m), sorted(m.__dict__), sorted(m._modules)) for k, m in model.named_modules()},
        "adapters": {name: repr(a) for name, a in gw.adapters(model).items()},
        "active": gw.active(model),
        "config": model.config.to_dict() if hasattr(model, "config") else None,
    }


def disk(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"/" for p in sorted(folder.rglob("*"))}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change adapter.json."""
    path = folder / "adapter.json"
    data = json.loads(path.read_text())
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors, with a matching hash: a file that was made so, not one that was damaged."""
    path = folder / "adapter.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    data = safetensors.torch.save(tensors)
    path.write_bytes(data)
    rewrite(folder, lambda d: d.update(sha256=hashlib.sha256(data).hexdigest()))
