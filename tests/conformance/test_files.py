"""Saving and loading, for every method on every host."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graftwork as gw

from .cases import Snapshot, calibrate, close, every, first, grafted, leave_init, on, train
from .hosts import fresh, output
from .settings import CASES, Case

TESTS = Path(__file__).parents[1]


@every
def test_saved_and_loaded_is_the_same_to_the_bit(case: Case, tmp_path: Path):
    inputs = case.host.inputs()
    model, adapter = grafted(case)
    before = Snapshot(model)
    gw.save(model, "a", tmp_path / "x")
    before.same(model)
    out = output(model, inputs)
    twin = fresh(case.host)
    torch.manual_seed(1234)  # what is drawn while loading must not matter
    loaded = gw.load(twin, tmp_path / "x", "b")
    assert torch.equal(output(twin, inputs), out)
    assert [s.key for s in loaded.sites] == [s.key for s in adapter.sites]
    assert not any(p.requires_grad for p in twin.parameters())
    # what was loaded can be saved again, and is the same file
    gw.save(twin, "b", tmp_path / "y")
    assert (tmp_path / "x" / "adapter.safetensors").read_bytes() == (
        tmp_path / "y" / "adapter.safetensors"
    ).read_bytes()
    gw.remove(twin, "b")
    Snapshot(fresh(case.host)).same_bits(twin)


@every
def test_a_file_holds_what_was_trained_and_no_more(case: Case, tmp_path: Path):
    model, adapter = grafted(case)
    gw.save(model, "a", tmp_path)
    size = sum((tmp_path / name).stat().st_size for name in ("adapter.safetensors", "adapter.json"))
    trained = sum(p.numel() * p.element_size() for p in adapter.parameters())
    names = len(adapter.state_dict())
    # a tensor's entry in the header (name, shape, place) is at most 220 bytes; at a real size it is lost in the 5%
    assert size <= 1.05 * case.setting.stored * trained + 4000 + 220 * max(0, names - 8)


@first
def test_training_goes_on_from_a_resumable_save(case: Case, tmp_path: Path):
    """Two steps, a save, a load into a fresh model and two more are the same as four."""
    inputs = case.host.inputs()
    model, adapter = grafted(case, noise=False)
    calibrate(model, case)
    train(model, adapter, inputs, range(2), 4)
    gw.save(model, "a", tmp_path, resume=True)
    train(model, adapter, inputs, range(2, 4), 4)
    twin = fresh(case.host)
    loaded = gw.load(twin, tmp_path, trainable=True)
    assert loaded.methods == tuple(dataclasses.replace(m) for m in adapter.methods)
    train(twin, loaded, inputs, range(2, 4), 4)
    one, two = adapter.state_dict(), loaded.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert torch.equal(output(twin, inputs), output(model, inputs))


@on("linear_square", "bert", "t5")
def test_the_order_of_loading_does_not_matter(case: Case, tmp_path: Path):
    inputs = case.host.inputs()
    model, _ = grafted(case, "1")
    leave_init(gw.graft(model, case.method, "default", head=False, seed=8), seed=8)
    for name in ("1", "default"):
        gw.save(model, name, tmp_path / name)
    outputs = {}
    for order in (("1", "default"), ("default", "1")):
        twin = fresh(case.host)
        for name in order:
            gw.load(twin, tmp_path / name)
        assert gw.active(twin) == order[1]
        for name in order:
            gw.activate(twin, name)
            outputs.setdefault(name, []).append(output(twin, inputs))
    for one, two in outputs.values():
        assert torch.equal(one, two)
    assert not torch.equal(outputs["1"][0], outputs["default"][0])


@on("linear_square", "conv2d", "bert")
def test_a_half_precision_copy_of_the_backbone_takes_the_adapter(case: Case, tmp_path: Path):
    inputs = case.host.inputs()
    model, _ = grafted(case)
    gw.save(model, "a", tmp_path)
    twin = fresh(case.host).bfloat16()
    loaded = gw.load(twin, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    close(output(twin, half), output(model, inputs), 0.1)


READ_BACK = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from conformance.hosts import fresh, output
from conformance.settings import CASES
import graftwork as gw
for case in CASES:
    folder = Path(sys.argv[1]) / str(case)
    if folder.is_dir():
        model = fresh(case.host)
        gw.load(model, folder)
        torch.save(output(model, case.host.inputs()).detach(), folder / "output")
"""


def test_another_process_computes_the_same(tmp_path: Path):
    expected = {}
    for case in CASES:
        model, _ = grafted(case)
        gw.save(model, "a", tmp_path / str(case))
        expected[str(case)] = output(model, case.host.inputs()).detach()
    threads = str(torch.get_num_threads())  # a convolution of more threads is another sum
    environment = {**os.environ, "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-c", READ_BACK, str(tmp_path), str(TESTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    different = [name for name, out in expected.items() if not torch.equal(torch.load(tmp_path / name / "output"), out)]
    assert not different, different


@pytest.mark.parametrize("case", [c for c in CASES if c.host.name == "bert"], ids=str)
def test_the_card_and_the_description_name_the_method(case: Case, tmp_path: Path):
    model, adapter = grafted(case)
    adapter.metadata = {"data": {"source": "a | b"}, "metrics": {"accuracy": 0.5}}
    gw.save(model, "a", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert case.name in card and "accuracy" in card and f"{adapter.num_parameters:,}" in card
    assert gw.load(fresh(case.host), tmp_path).metadata == adapter.metadata
