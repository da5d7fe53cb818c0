"""What loading, switching and removing may cost, told by what is called and what is held, never by the clock."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import graftwork as gw
from graftwork.grafting import install, root
from graftwork.sites import body
from graftwork.store import fingerprint
from graftwork.store.tensors import NAMES, reading, written

from .files import bert, logits, saved


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read of a whole backbone since the start."""
    seen: list[str] = []
    for module, name in ((body, "anatomy"), (fingerprint, "_probe")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, own=own, name=name: (seen.append(name), own(*a))[1])
    return seen


def test_the_twentieth_load_reads_no_backbone(tmp_path: Path, readings: list[str]):
    folder, model = saved(tmp_path), bert()
    readings.clear()
    for i in range(20):
        gw.load(model, folder, f"a{i}")
    assert readings == ["anatomy", "_probe"]
    sites = {id(site) for adapter in gw.adapters(model).values() for site in adapter.sites}
    assert len(sites) == len(gw.adapters(model)["a0"].sites), "every adapter speaks of the same sites"


def changes() -> dict[str, Any]:
    def replace(model: nn.Module) -> None:
        model.bert.pooler.dense = nn.Linear(24, 24)

    def write(model: nn.Module) -> None:
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight.add_(1)

    def swap(model: nn.Module) -> None:
        model.bert.encoder.layer[0].output.dense.weight.data = torch.ones(24, 40)

    return {"a module": replace, "numbers": write, "storage": swap, "precision": lambda model: model.half()}


@pytest.mark.parametrize("what", changes())
def test_a_changed_backbone_is_read_again(tmp_path: Path, what: str):
    folder, model = saved(tmp_path), bert()
    gw.load(model, folder, "first")
    before = root.body_of(model)
    assert root.body_of(model) is before
    changes()[what](model)
    assert root.body_of(model) is not before


def test_other_numbers_are_refused_while_grafted(tmp_path: Path):
    folder, model = saved(tmp_path), bert()
    gw.load(model, folder, "first")
    with torch.no_grad():
        for _, p in install.base_parameters(model):
            p.add_(1)
    with pytest.raises(gw.GraftError, match="other weights"):
        gw.load(model, folder, "second")


def test_loading_draws_nothing_and_holds_the_bytes_of_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, model = saved(tmp_path), bert()
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda *a, **k: pytest.fail("a value was drawn"))
    adapter = gw.load(model, folder)
    parameters = list(adapter.parameters())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters), "more is held than its numbers"


@pytest.mark.parametrize("first", [7, 16, 3001])
def test_what_is_loaded_lies_where_a_grafted_tensor_would(tmp_path: Path, first: int):
    """Kernels may round otherwise on unaligned numbers. A tensor of odd size in front of the others moves all of them."""
    data = safetensors.torch.save({"a": torch.ones(first), "b": torch.ones(7), "c": torch.ones(5, 3)})
    (tmp_path / "adapter.safetensors").write_bytes(data)
    with reading(tmp_path, hashlib.sha256(data).hexdigest(), "load") as found:
        pass
    assert {name: t.data_ptr() % 64 for name, t in found.items()} == dict.fromkeys("abc", 0)
    assert all(torch.equal(t, torch.ones_like(t)) for t in found.values()) and found["c"].shape == (5, 3)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_the_file_is_that_of_safetensors(dtype: torch.dtype):
    """Byte for byte where all numbers are of one kind; of several, safetensors reads the same."""
    tensors = {"b/down": torch.randn(3, 5), "a": torch.randn(()), "é": torch.ones(0, 3), "c": torch.ones(1)}
    one_kind = {name: t.to(dtype) for name, t in tensors.items()}
    assert written(one_kind) == safetensors.torch.save(one_kind)
    mixed = one_kind | {"z": torch.arange(7, dtype=torch.int16), "y": torch.rand(3, dtype=torch.float64)}
    found = safetensors.torch.load(written(mixed))
    assert found.keys() == mixed.keys()
    for name, t in mixed.items():
        assert found[name].dtype == t.dtype and found[name].shape == t.shape
        assert written({"t": found[name]}) == written({"t": t}), name


def test_numbers_that_files_do_not_hold_are_refused(tmp_path: Path):
    model = bert()
    adapter = gw.graft(model, gw.LoRA(r=3), "a")
    delta = next(adapter.deltas())
    delta.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(gw.GraftError, match=r"odd(.|\n)*complex128"):
        gw.save(model, "a", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_two_loads_and_aliases_share_no_numbers(tmp_path: Path):
    folder, model = saved(tmp_path), bert()
    a, b = gw.load(model, folder, "a"), gw.load(model, folder, "b")
    before = logits(model)
    with torch.no_grad():
        for p in a.parameters():
            p.zero_()
    assert torch.equal(logits(model), before) and all(p.abs().sum() > 0 for n, p in b.named_parameters())


def test_a_loaded_adapter_is_saved_as_it_was(tmp_path: Path):
    folder, model = saved(tmp_path / "one"), bert()
    gw.load(model, folder)
    again = gw.save(model, "a", tmp_path / "two")
    assert (again / "adapter.safetensors").read_bytes() == (folder / "adapter.safetensors").read_bytes()


def test_switching_between_like_adapters_swaps_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, model = saved(tmp_path), bert()
    for name in ("a", "b"):
        gw.load(model, folder, name)
    armed = {path: type(m) for path, m in model.named_modules()}
    monkeypatch.setattr(install, "disarm", lambda module: pytest.fail("a class was swapped"))
    monkeypatch.setattr(install, "Graft", lambda runtime: pytest.fail("a graft was made"))
    gw.activate(model, "a")
    assert {path: type(m) for path, m in model.named_modules()} == armed
