"""Loading: what comes back, and that anything wrong is refused with its name and without a trace."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import graftwork as gw

from .files import bert, disk, logits, look, retensor, rewrite, saved, trained


def refused(folder: Path, *words: str, model: nn.Module | None = None, name: str | None = None) -> None:
    """gw.load is a GraftError with these words, on a bare and on a grafted model; neither model nor disk changes."""
    models = [model] if model is not None else [bert(), bert()]
    if model is None:
        trained(models[1], "other", seed=9)
    files = disk(folder) if folder.is_dir() else {}
    for m in models:
        before, out, state = look(m), logits(m), torch.get_rng_state()
        with pytest.raises(gw.GraftError) as error:
            gw.load(m, folder, name)
        for word in words:
            assert re.search(word, str(error.value)), f"{word!r} not in:\n{error.value}"
        assert "found:" in str(error.value) and "do:" in str(error.value)
        assert look(m) == before and torch.equal(logits(m), out)
        assert torch.equal(torch.get_rng_state(), state)
    assert (disk(folder) if folder.is_dir() else {}) == files


def test_everything_comes_back(tmp_path: Path):
    model = bert()
    adapter = trained(model, methods=[gw.LoRA(r=3), gw.Bottleneck(d=5)])
    adapter.labels, adapter.metadata = ("no", "yes"), {"data": {"source": "x"}}
    gw.save(model, "a", tmp_path)
    twin = bert()
    loaded = gw.load(twin, tmp_path)
    assert torch.equal(logits(twin), logits(model))
    assert gw.active(twin) == "a" and gw.adapters(twin) == {"a": loaded}
    assert loaded.methods == adapter.methods and loaded.labels == adapter.labels and loaded.metadata == adapter.metadata
    assert [s.key for s in loaded.sites] == [s.key for s in adapter.sites]
    assert twin.config.id2label == {0: "no", 1: "yes"}
    assert not loaded.trainable and not any(p.requires_grad for p in twin.parameters())
    gw.remove(twin, "a")
    assert look(twin)["state"] == look(bert())["state"] and all(p.requires_grad for p in twin.parameters())


def test_trainable_parameters_learn_on(tmp_path: Path):
    twin = bert()
    loaded = gw.load(twin, saved(tmp_path), trainable=True)
    assert {id(p) for p in twin.parameters() if p.requires_grad} == {id(p) for p in loaded.parameters()}


def test_loading_activates_in_the_place_of_what_was_active(tmp_path: Path):
    model = bert()
    trained(model, "other", seed=5)
    gw.load(model, saved(tmp_path))
    assert gw.active(model) == "a" and list(gw.adapters(model)) == ["other", "a"]
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["1", "a.b", "x/y", "..", "a >> b", 'say "hi"', "ä ö", "%2F"])
def test_names_are_data(tmp_path: Path, name: str):
    """A name is stored inside the file, never made into a path, and never matched inside another."""
    model = bert()
    trained(model, name)
    trained(model, "default", seed=2)
    gw.save(model, name, tmp_path / "x")
    assert sorted(disk(tmp_path)) == ["x", "x/README.md", "x/adapter.json", "x/adapter.safetensors"]
    twin = bert()
    assert gw.load(twin, tmp_path / "x").name == name
    gw.activate(model, gw.A(name))
    assert torch.equal(logits(twin), logits(model))


class Odd(nn.Module):
    """Module names with slashes, percent signs and the word that shared tensors are stored under."""

    def __init__(self) -> None:
        super().__init__()
        names = ["a/b", "a", "shared", "x%2Fy", "last"]
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def test_module_names_are_data(tmp_path: Path):
    torch.manual_seed(0)
    model, twin = Odd(), Odd()
    twin.load_state_dict(model.state_dict())
    trained(model, head=False)
    gw.save(model, "a", tmp_path)
    gw.load(twin, tmp_path)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), twin(x))


def test_two_numbers_of_labels_on_one_backbone(tmp_path: Path):
    outputs = {}
    for name, labels in (("two", 2), ("five", 5)):
        model = bert(labels)
        trained(model, name, seed=labels).labels = tuple(f"{name} {i}" for i in range(labels))
        outputs[name] = logits(model)
        gw.save(model, name, tmp_path / name)
    model = bert(3)  # of yet another number
    base = logits(model)
    for name in ("two", "five"):
        gw.load(model, tmp_path / name)
    for name in ("two", "five", "two"):
        gw.activate(model, name)
        assert torch.equal(logits(model), outputs[name])
        assert list(model.config.id2label.values()) == list(gw.adapters(model)[name].labels)
        out = model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([outputs[name].shape[1] - 1]))
        assert torch.isfinite(out.loss)
    gw.activate(model, None)
    assert torch.equal(logits(model), base) and len(model.config.id2label) == 3


def test_a_freshly_made_head_is_no_other_backbone(tmp_path: Path):
    """Heads and poolers are re-initialised for every task: the adapter brings its own head."""
    model = bert()
    trained(model)
    gw.save(model, "a", tmp_path)
    twin = bert()
    with torch.no_grad():
        twin.classifier.weight.normal_()
    gw.load(twin, tmp_path)
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_copies_of_the_same_weights(tmp_path: Path, dtype: torch.dtype):
    loaded = gw.load(bert().to(dtype), saved(tmp_path / "x"))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    model = bert().to(dtype)
    gw.load(model, tmp_path / "x")
    gw.save(model, "a", tmp_path / "y")
    gw.load(bert(), tmp_path / "y")


READ_BACK = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
import graftwork as gw
from store.files import bert, logits
assert "pickle" not in gw.load.__code__.co_names
model = bert()
gw.load(model, sys.argv[1] + "/x")
torch.save(logits(model), sys.argv[1] + "/out")
"""


def test_another_process_reads_the_same_bits(tmp_path: Path):
    model = bert()
    trained(model, methods=[gw.LoRA(r=3), gw.Bottleneck(d=5)])
    gw.save(model, "a", tmp_path / "x")
    command = [sys.executable, "-c", READ_BACK, str(tmp_path), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "out"), logits(model))


# --- refusals -------------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path):
    refused(tmp_path / "nowhere", "no such folder")


def test_a_folder_without_an_adapter(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, r"no adapter\.json", r"notes\.txt")


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "unpickled")


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.pt", "x.pkl", "x.pth", "x.ckpt"])
def test_a_pickle_is_refused_by_name_and_never_opened(tmp_path: Path, name: str):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    refused(tmp_path / "x", re.escape(name), "pickle", "safetensors")
    refused(tmp_path / "x" / name, re.escape(name), "pickle", "safetensors")
    assert not (tmp_path / "mark").exists()


def test_a_pickle_under_the_name_of_the_tensors(tmp_path: Path):
    folder = saved(tmp_path / "x")
    (folder / "adapter.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    refused(folder, r"adapter\.safetensors")
    assert not (tmp_path / "mark").exists()


def test_a_config_of_no_library_that_is_known(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, r"adapter_config\.json", r"docs/formats\.md")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.7, 0.999])
def test_truncated_tensors(tmp_path: Path, share: float):
    path = saved(tmp_path) / "adapter.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(tmp_path, r"adapter\.safetensors", "truncated")


@pytest.mark.parametrize("place", [0.02, 0.5, 0.999])
def test_altered_tensors(tmp_path: Path, place: float):
    path = saved(tmp_path) / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(bytes(data))
    refused(tmp_path, r"adapter\.safetensors", "altered|damaged|truncated|longer")


def test_that_a_file_is_altered_is_said_before_all_else(tmp_path: Path):
    """The hash is taken while the rest is looked at; what else is wrong with a file of other bytes is no matter."""
    retensor(saved(tmp_path), lambda t: t[UP].view(-1)[:1].fill_(float("nan")))
    path = tmp_path / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    refused(tmp_path, "altered")
    other = bert(hidden=32)
    before = look(other)
    with pytest.raises(gw.GraftError, match="altered"):
        gw.load(other, tmp_path)
    assert look(other) == before


def test_extra_bytes(tmp_path: Path):
    path = saved(tmp_path) / "adapter.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    refused(tmp_path, "longer than its header says")


def test_missing_tensors_file(tmp_path: Path):
    (saved(tmp_path) / "adapter.safetensors").unlink()
    refused(tmp_path, r"adapter\.safetensors", "missing")


def test_tensors_of_another_adapter(tmp_path: Path):
    saved(tmp_path / "x")
    saved(tmp_path / "y", seed=3)
    shutil.copy(tmp_path / "y" / "adapter.safetensors", tmp_path / "x")
    refused(tmp_path / "x", "altered")


def test_a_header_that_claims_too_much(tmp_path: Path):
    path = saved(tmp_path) / "adapter.safetensors"
    data = path.read_bytes()
    for length in (2**63, len(data), 3):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        refused(tmp_path, r"adapter\.safetensors", "truncated|damaged")


UP = "0/bert.encoder.layer.1.attention.self.value:v/up"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float):
    retensor(saved(tmp_path), lambda t: t[UP].view(-1)[:1].fill_(value))
    refused(tmp_path, re.escape(UP), "not finite")


def test_a_wrong_shape(tmp_path: Path):
    retensor(saved(tmp_path), lambda t: t.update({UP: torch.zeros(24, 4)}))
    refused(tmp_path, r"value:v", r"\[24, 4\]", r"\[24, 3\]")


def test_a_head_of_another_width(tmp_path: Path):
    retensor(saved(tmp_path), lambda t: t.update({"1/classifier:head/values.weight": torch.zeros(2, 23)}))
    refused(tmp_path, "classifier:head", r"\[2, 23\]", r"\[2, 24\]")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_a_wrong_dtype(tmp_path: Path, dtype: torch.dtype):
    retensor(saved(tmp_path), lambda t: t.update({UP: t[UP].to(dtype)}))
    refused(tmp_path, "value:v/up", str(dtype).removeprefix("torch."), "float32")


def test_numbers_too_large_for_the_backbone(tmp_path: Path):
    retensor(saved(tmp_path), lambda t: t.update({UP: t[UP] + 1e6}))
    model = bert().half()
    before = look(model)
    with pytest.raises(gw.GraftError, match=r"too large for torch\.float16"):
        gw.load(model, tmp_path)
    assert look(model) == before


def test_a_missing_tensor(tmp_path: Path):
    retensor(saved(tmp_path), lambda t: t.pop(UP))
    refused(tmp_path, "'up'", "value:v", "nothing")


@pytest.mark.parametrize(
    "name",
    [
        "0/bert.encoder.layer.1.attention.self.value:v/extra",
        "0/bert.nowhere:q/up",
        "7/classifier:head/x",
        "../../x",
        "up",
        "-1/a:q/b",
        "0/shared/x",
    ],
)
def test_an_unknown_tensor(tmp_path: Path, name: str):
    retensor(saved(tmp_path), lambda t: t.update({name: torch.zeros(2)}))
    refused(tmp_path, "extra|nowhere|belongs to no method|shared")


def test_another_checkpoint_of_the_same_architecture(tmp_path: Path):
    saved(tmp_path)
    refused(tmp_path, "other weights", "made for: ", "this one: ", "structure [0-9a-f]{12}", model=bert(seed=1))


def test_another_architecture(tmp_path: Path):
    saved(tmp_path)
    refused(tmp_path, "another structure", "made for: ", "this one: ", model=bert(hidden=32))
    config = transformers.RobertaConfig(
        vocab_size=48,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
    )
    refused(
        tmp_path,
        "another structure",
        "RobertaForSequence",
        model=transformers.RobertaForSequenceClassification(config).eval(),
    )


def test_one_weight_changed_by_training_is_another_backbone(tmp_path: Path):
    saved(tmp_path)
    model = bert()
    with torch.no_grad():
        for p in model.bert.encoder.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 2e-3)
    refused(tmp_path, "other weights", model=model)


def test_a_site_that_the_backbone_lacks(tmp_path: Path):
    """The same body without the head that the adapter trains."""
    saved(tmp_path)
    rewrite(tmp_path, lambda d: d["methods"][0]["sites"].__setitem__(0, "bert.encoder.layer.0.attention.self.qeury:q"))
    refused(tmp_path, "qeury:q", "did you mean")


def test_a_newer_format(tmp_path: Path):
    rewrite(saved(tmp_path), lambda d: d.update(format=3))
    refused(tmp_path, "format 3", "newer graftwork")


@pytest.mark.parametrize("version", [None, "1", True, 0, -1, 1.5])
def test_no_proper_format(tmp_path: Path, version: object):
    rewrite(saved(tmp_path), lambda d: d.update(format=version))
    refused(tmp_path, "format")


def test_an_unknown_method(tmp_path: Path):
    rewrite(saved(tmp_path), lambda d: d["methods"][0]["method"].update(method="loar"))
    refused(tmp_path, "loar", "did you mean 'lora'")


def test_an_unknown_hyper_parameter(tmp_path: Path):
    rewrite(saved(tmp_path), lambda d: d["methods"][0]["method"].update(alhpa=3.0))
    refused(tmp_path, "alhpa", "did you mean 'alpha'")


@pytest.mark.parametrize("value", [0, "8", None, 2.5, [1], {"method": "lora"}])
def test_a_hyper_parameter_out_of_range(tmp_path: Path, value: object):
    rewrite(saved(tmp_path), lambda d: d["methods"][0]["method"].update(r=value))
    refused(tmp_path, r"adapter\.json", "r=", "whole number")


@pytest.mark.parametrize("key", ["name", "methods", "labels", "sha256", "aliases", "backbone", "metadata"])
@pytest.mark.parametrize("value", [None, 7, "x", [7], {"a": 1}, "missing"])
def test_a_damaged_description(tmp_path: Path, key: str, value: object):
    told = json.loads((saved(tmp_path) / "adapter.json").read_text())
    good = [("name", "x"), ("name", "missing"), ("labels", None), ("metadata", {"a": 1})]
    if value == "missing":
        rewrite(tmp_path, lambda d: d.pop(key) and None)
    else:
        rewrite(tmp_path, lambda d: d.update({key: value}))
        if (key, value) in good:
            assert gw.load(bert(), tmp_path).methods and told["format"] == 1
            return
    refused(tmp_path, r"adapter\.json|adapter\.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000, '{"format": 1}', '{"format": NaN}'])
def test_a_description_that_is_none(tmp_path: Path, text: str):
    (saved(tmp_path) / "adapter.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, r"adapter\.json")


def test_paths_in_a_file_are_never_followed(tmp_path: Path):
    saved(tmp_path / "x")
    (tmp_path / "secret.safetensors").write_bytes((tmp_path / "x" / "adapter.safetensors").read_bytes())
    (tmp_path / "x" / "adapter.safetensors").unlink()
    rewrite(tmp_path / "x", lambda d: d.update(sha256="/../../secret"))
    refused(tmp_path / "x", "sha256")


def test_a_name_that_exists(tmp_path: Path):
    model = bert()
    gw.load(model, saved(tmp_path))
    refused(tmp_path, "the model has one", model=model)
    assert gw.load(model, tmp_path, "another").name == "another"


@pytest.mark.parametrize("name", ["", 7])
def test_a_name_that_is_none(tmp_path: Path, name: object):
    refused(saved(tmp_path), "not a name", name=name)


def test_into_a_merged_model(tmp_path: Path):
    model = bert()
    trained(model, "b", head=False)
    gw.merge(model)
    refused(saved(tmp_path), "merged", "unmerge", model=model)


def test_onto_a_part_of_a_grafted_model(tmp_path: Path):
    saved(tmp_path)
    model = bert()
    trained(model, "b")
    before = look(model)
    with pytest.raises(gw.GraftError, match="another model's adapter"):
        gw.load(model.bert, tmp_path)
    assert look(model) == before


def test_the_meta_device_takes_the_values_of_the_file(tmp_path: Path):
    """A backbone whose weights come later: the adapter's own values are real at once."""
    model = Odd()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    trained(model, head=False)
    gw.save(model, "a", tmp_path)
    twin = Odd().to("meta")
    loaded = gw.load(twin, tmp_path)
    assert not any(p.is_meta for p in loaded.parameters())
    twin.load_state_dict(base, assign=True, strict=False)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), twin(x))


def test_forty_adapters_cost_what_forty_cost(tmp_path: Path):
    """Loading one does not walk what was loaded before."""
    import time

    saved(tmp_path)
    model = bert()
    times = []
    for i in range(40):
        start = time.process_time()
        gw.load(model, tmp_path, f"n{i}")
        times.append(time.process_time() - start)
    early, late = sorted(times[1:11])[5], sorted(times[-10:])[5]
    assert late < 4 * early + 0.01
