"""Folders that are damaged, hostile, or made for something else: one clear error each, and a model that is as it was."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft import LoraConfig

import graftwork as gw
from graftwork.formats.peft import FAMILIES
from graftwork.grafting.root import is_grafted

from .peers import loaded, model, outputs, peer, written
from .test_peft import CASES, tensors_of

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(peer(*CASES["lora"]), tmp_path_factory.mktemp("lora"))


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A fresh copy of a LoRA adapter."""
    place = tmp_path / "adapter"
    place.mkdir()
    for file in source.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def refused(place: Path, *words: str, name: str = "llama", **given: Any) -> None:
    """Loading it is a GraftError with these words, and the model stays what it was."""
    m = model(name)
    before = outputs(m, name)
    with pytest.raises(gw.GraftError) as error:
        gw.load(m, place, "a", **given)
    for word in words:
        assert word in str(error.value), (word, str(error.value))
    assert not is_grafted(m) and type(m) is type(model(name))
    assert outputs(m, name).equal(before)


def change(place: Path, **fields: Any) -> Path:
    path = place / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return place


def rewrite(place: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = tensors_of(place)
    edit(tensors)
    safetensors.torch.save_file(tensors, place / "adapter_model.safetensors")
    return place


OPTIONS = {
    "use_qalora": True,
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
    "velora_config": {"num_groups": 4},
    "monteclora_config": {"n": 4},
    "use_bdlora": {"nblocks": 2},
    "something_new": 0.5,
    "init_lora_weights": "corda",
    "bias": "some",
    "target_modules": r"(a+)+$",
    "rank_pattern": {"(.*)*x": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_changes_the_mathematics_is_refused_by_name(option: str, folder: Path) -> None:
    refused(change(folder, **{option: OPTIONS[option]}), option)


@pytest.mark.parametrize("kind", [*sorted({kind.value for kind in peft.PeftType} - FAMILIES.keys()), "NEW"])
def test_a_method_that_is_not_here_is_refused_by_name(kind: str, folder: Path) -> None:
    refused(change(folder, peft_type=kind), kind)


@pytest.mark.parametrize("kind", [None, 3, ["LORA"], {}])
def test_a_method_without_a_name(kind: Any, folder: Path) -> None:
    refused(change(folder, peft_type=kind), "peft_type")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "4"),
        ("r", 0),
        ("r", -3),
        ("r", 10**400),
        ("r", True),
        ("lora_alpha", [1]),
        ("lora_dropout", 1.5),
        ("target_modules", [3]),
        ("target_modules", {"a": 1}),
        ("rank_pattern", {"q_proj": "many"}),
        ("modules_to_save", [1]),
        ("trainable_token_indices", {"embed_tokens": 5}),
        ("trainable_token_indices", [5, 5]),
        ("trainable_token_indices", [10**6]),
        ("trainable_token_indices", {"nowhere": [1]}),
        ("layers_to_transform", ["x"]),
    ],
)
def test_a_field_of_another_kind(field: str, value: Any, folder: Path) -> None:
    refused(change(folder, **{field: value}))


def test_missing_and_superfluous_keys_are_each_named(folder: Path) -> None:
    stray = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[stray] = tensors.pop(Q0)

    rewrite(folder, edit)
    refused(folder, "missing", Q0, stray, "partial=True")
    with pytest.warns(UserWarning, match=r"(?s)missing.*layers\.0.*nowhere.*layers\.7"):
        m = loaded("llama", folder, partial=True)
    paths = [site.path for site in gw.adapters(m)["a"].sites]
    assert "model.layers.0.self_attn.q_proj" not in paths and len(paths) == 3


def test_nothing_left_is_an_error_even_when_partial(folder: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")
    refused(folder, "no site of this backbone is left", partial=True)


def test_keys_with_another_prefix_are_no_untrained_adapter(folder: Path) -> None:
    tensors = {k.replace("base_model.model.", "base_model."): v for k, v in tensors_of(folder).items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    refused(folder, "missing", Q0)


def test_wrong_shapes_name_the_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({Q0: torch.ones(5, 24)}))
    refused(folder, Q0, "[5, 24]", "[4, 24]")


def test_another_backbone(folder: Path) -> None:
    refused(folder, "target_modules", name="bert")
    refused(folder, "[4, 24]", "[4, 40]", name="wide")


def test_whole_numbers_for_real_ones(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({Q0: torch.ones(4, 24, dtype=torch.int64)}))
    refused(folder, "int64")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(value: float, folder: Path) -> None:
    rewrite(folder, lambda t: t[Q0].view(-1).__setitem__(3, value))
    refused(folder, Q0, "not finite")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_written_folders(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    refused(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_files_that_were_cut_off(name: str, share: float, folder: Path) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * share)])
    refused(folder)


def test_a_header_of_a_gigabyte(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**30) + b"{" + b" " * 1000)
    refused(folder, "1,073,741,824")


def test_tensors_that_overlap(folder: Path) -> None:
    header = {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("a", "b")}
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refused(folder, "damaged")


def test_names_that_stand_twice(folder: Path) -> None:
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = b"{" + entry + b"," + entry + b"}"
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused(folder, "'a' stands twice")
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"r": 4, ', 1))
    refused(folder, "'r' stands twice")


def test_json_that_is_no_object_or_too_deep(folder: Path) -> None:
    for text in ("[]", "3", "null", "[" * 100_000, '{"r": NaN, "peft_type": "LORA"}', "\xff"):
        (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
        refused(folder)


def _as_bin(folder: Path, value: Any) -> Path:
    (folder / "adapter_model.safetensors").unlink()
    torch.save(value, folder / "adapter_model.bin")
    return folder


def test_torch_files_are_read_by_weights_only(folder: Path, source: Path) -> None:
    _as_bin(folder, tensors_of(folder))
    assert outputs(loaded("llama", folder), "llama").equal(outputs(loaded("llama", source), "llama"))


class Hostile:
    """What a pickle can do."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("framed", [True, False])
def test_a_pickle_with_code_is_not_run(framed: bool, folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "run"
    (folder / "adapter_model.safetensors").unlink()
    place = folder / "adapter_model.bin"
    if framed:
        torch.save({"a": Hostile(trap)}, place)
    else:
        place.write_bytes(pickle.dumps({"a": Hostile(trap)}))
    refused(folder, "adapter_model.bin")
    assert not trap.exists()
    torch.load(io.BytesIO(place.read_bytes()), weights_only=False) if framed else pickle.loads(place.read_bytes())
    assert trap.exists()  # it would have been


def test_an_archive_with_paths_that_lead_out_of_it(folder: Path) -> None:
    place = _as_bin(folder, tensors_of(folder)) / "adapter_model.bin"
    with zipfile.ZipFile(place, "a") as archive:
        archive.writestr("../../outside", b"x" * 10)
    refused(folder, "../../outside")
    assert not (folder / "../../outside").exists() and not (folder / "../outside").exists()


def test_an_archive_that_unpacks_to_more_than_it_is(folder: Path) -> None:
    place = _as_bin(folder, tensors_of(folder)) / "adapter_model.bin"
    with zipfile.ZipFile(place, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", b"\0" * 10**7)
    refused(folder, "compressed")


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(1).expand(10**6, 10**6),
        torch.ones(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.empty(3, device="meta"),
        [1, 2],
        "text",
    ],
    ids=["expanded", "sparse", "quantised", "meta", "list", "text"],
)
def test_what_is_no_plain_tensor(value: Any, folder: Path) -> None:
    refused(_as_bin(folder, {Q0: value}), "adapter_model.bin")


def test_not_by_name(folder: Path) -> None:
    refused(_as_bin(folder, [torch.ones(3)]), "list")


def test_the_name_is_taken(folder: Path) -> None:
    m = loaded("llama", folder)
    before = outputs(m, "llama")
    with pytest.raises(gw.GraftError, match="'a'"):
        gw.load(m, folder, "a")
    assert outputs(m, "llama").equal(before) and list(gw.adapters(m)) == ["a"]


def test_half_precision_keeps_to_the_backbone(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    adapter = gw.adapters(loaded("llama", folder))["a"]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_what_peft_cannot_hold_is_not_written(tmp_path: Path) -> None:
    m = model("llama")
    gw.graft(m, gw.Bottleneck(d=3), "a")
    gw.graft(m, [gw.LoRA(r=2), gw.LoRA(r=3)], "b", head=False)
    gw.graft(m, [gw.LoRA(r=2), gw.Bottleneck(d=3)], "c", head=False)
    gw.graft(m, gw.Prefix(length=3), "d", head=False)
    gw.graft(m, gw.Prompt(length=3, ensemble=2), "e", head=False)
    for name, word in zip("abcde", ("bottleneck", "lora", "bottleneck", "positions", "ensemble"), strict=True):
        with pytest.raises(gw.GraftError, match=word):
            gw.save(m, name, tmp_path / name, format="peft")
        assert not (tmp_path / name).exists()


def test_formats_by_name(folder: Path, tmp_path: Path) -> None:
    m = loaded("llama", folder)
    for format, word in (("pefft", "did you mean"), ("", "unknown")):
        with pytest.raises(gw.GraftError, match=word):
            gw.save(m, "a", tmp_path / "x", format=format)
    with pytest.raises(gw.GraftError, match="state of a training"):
        gw.save(m, "a", tmp_path / "x", format="peft", resume=True)
    gw.merge(m)
    with pytest.raises(gw.GraftError, match="unmerge"):
        gw.save(m, "a", tmp_path / "x", format="peft")
    gw.unmerge(m)
    gw.save(m, "a", tmp_path / "own")
    with pytest.raises(gw.GraftError, match="read first"):
        gw.save(m, "a", tmp_path / "own", format="peft")
    assert not (tmp_path / "x").exists()


def test_values_that_no_file_can_hold(folder: Path, tmp_path: Path) -> None:
    m = loaded("llama", folder)
    next(gw.adapters(m)["a"].parameters()).data[0, 0] = float("nan")
    with pytest.raises(gw.GraftError, match="diverged"):
        gw.save(m, "a", tmp_path / "x", format="peft")
    assert not (tmp_path / "x").exists()


def test_a_disk_that_refuses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = loaded("llama", folder)
    place = gw.save(m, "a", tmp_path / "x", format="peft")
    before = {file.name: file.read_bytes() for file in place.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    gw.adapters(m)["a"].metadata.clear()
    with pytest.raises(gw.GraftError, match="No space left"):
        gw.save(m, "a", place, format="peft")
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before


def test_several_folders_on_one_backbone(source: Path, tmp_path: Path) -> None:
    """Each computes what it does alone, beside the others and after they are gone."""
    second = written(peer("llama", LoraConfig(r=3, target_modules=["k_proj"], use_dora=True)), tmp_path)
    m = model("llama")
    bare = outputs(m, "llama")
    alone = {name: outputs(loaded("llama", place), "llama") for name, place in (("one", source), ("two", second))}
    gw.load(m, source, "one")
    gw.load(m, second, "two")
    for name, wanted in alone.items():
        with gw.using(m, name):
            assert outputs(m, "llama").equal(wanted)
    gw.remove(m, "two")
    gw.remove(m, "one")
    assert outputs(m, "llama").equal(bare)
