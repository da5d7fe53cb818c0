"""Files with bytes and values changed at random: a GraftError or an adapter, never anything else, and the model stays whole."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graftwork as gw
from graftwork.grafting.root import is_grafted

from .peers import model, outputs, peer, written
from .test_peft import CASES, tensors_of

SEEDS = (
    "lora_patterns",
    "lora_tokens_both",
    "lora_experts",
    "adalora",
    "ia3",
    "vera",
    "prefix",
    "prompt",
    "adaption_prompt",
    "ln_tuning",
)
SECONDS = 5  # of the processor's time, for one attempt: they take milliseconds


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    made = [(CASES[s][0], written(peer(*CASES[s]), tmp_path_factory.mktemp(s))) for s in SEEDS]
    as_torch = tmp_path_factory.mktemp("bin")
    shutil.copy(made[0][1] / "adapter_config.json", as_torch)
    torch.save(tensors_of(made[0][1]), as_torch / "adapter_model.bin")
    return [*made, (made[0][0], as_torch)]


@pytest.fixture(scope="module")
def hosts() -> dict[str, tuple[torch.nn.Module, list[type], torch.Tensor]]:
    out = {}
    for name in {CASES[s][0] for s in SEEDS}:
        m = model(name)
        out[name] = m, [type(module) for module in m.modules()], outputs(m, name)
    return out


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([10**9, 10**30, 1e308, -0.5, "", "q_proj", ".*", "(", "all"])
)
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["q_proj", "x", "r"]), v, max_size=2),
    max_leaves=5,
)


def _mutated_json(path: Path, draw: Any) -> None:
    data = json.loads(path.read_text())
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*sorted(data), "new_option"]))
        if draw(st.booleans()):
            data[name] = draw(values)
        else:
            data.pop(name, None)
    path.write_text(json.dumps(data))


def _mutated_bytes(path: Path, draw: Any) -> None:
    data = bytearray(path.read_bytes())
    reach = st.integers(0, max(len(data) - 1, 0)) | st.integers(0, min(len(data) - 1, 1500))  # the header more often
    for _ in range(draw(st.integers(1, 4))):
        at, what = draw(reach), draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if what == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
    path.write_bytes(bytes(data))


def _attempt(draw: Any, seeds: Any, hosts: Any) -> None:
    name, source = draw(st.sampled_from(seeds))
    m, classes, before = hosts[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        shutil.copytree(source, folder)
        files = sorted(path for path in folder.iterdir() if path.suffix != ".md")
        path = draw(st.sampled_from(files))
        (_mutated_json if path.suffix == ".json" and draw(st.booleans()) else _mutated_bytes)(path, draw)
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                gw.load(m, folder, "a", partial=draw(st.booleans()))
            except gw.GraftError:
                assert not is_grafted(m)
            else:
                gw.remove(m, "a")
        assert time.process_time() - start < SECONDS
    assert [type(module) for module in m.modules()] == classes
    assert draw(st.integers(0, 9)) or outputs(m, name).equal(before)  # one time in ten: it costs more than all else


few = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
many = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))


@few
@given(data=st.data())
def test_mutated_files(data: Any, seeds: Any, hosts: Any) -> None:
    _attempt(data.draw, seeds, hosts)


@pytest.mark.slow
@many
@given(data=st.data())
def test_many_mutated_files(data: Any, seeds: Any, hosts: Any) -> None:
    _attempt(data.draw, seeds, hosts)
