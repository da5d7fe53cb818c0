"""Saving: what is in the files, and that a failure of any kind leaves the old ones."""

from __future__ import annotations

import builtins
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import graftwork as gw
from graftwork.core.delta import WeightDelta

from .files import bert, disk, logits, look, saved, trained


def test_what_is_in_the_files(tmp_path: Path):
    model = bert()
    adapter = trained(model, methods=[gw.LoRA(r=3), gw.Bottleneck(d=5)])
    adapter.labels = ("no", "yes")
    adapter.metadata = {
        "data": {"source": "x.csv", "rows": 10},
        "metrics": {"accuracy": torch.tensor(0.5), "loss": float("nan")},
    }
    assert gw.save(model, "a", tmp_path / "deep" / "folder") == tmp_path / "deep" / "folder"
    assert sorted(disk(tmp_path / "deep" / "folder")) == ["README.md", "adapter.json", "adapter.safetensors"]
    told = json.loads((tmp_path / "deep" / "folder" / "adapter.json").read_text())
    assert told["format"] == 1 and told["name"] == "a" and told["parameters"] == adapter.num_parameters
    assert [m["method"]["method"] for m in told["methods"]] == ["lora", "bottleneck", "full"]
    assert told["methods"][0]["method"]["alpha"] == 16.0, "defaults are written too"
    assert told["methods"][0]["sites"] == [site.key for site in adapter.parts[0].sites]
    assert told["labels"] == ["no", "yes"]
    assert told["metadata"] == {"data": {"source": "x.csv", "rows": 10}, "metrics": {"accuracy": 0.5, "loss": None}}
    assert told["backbone"]["class"] == "BertForSequenceClassification" and len(told["backbone"]["structure"]) == 64
    assert told["versions"]["torch"] == torch.__version__
    card = (tmp_path / "deep" / "folder" / "README.md").read_text()
    for word in ("# a", "lora(r=3)", "bottleneck(d=5)", "no, yes", "accuracy", "x.csv", "gw.load"):
        assert word in card


def test_tensors_are_named_by_method_site_and_name(tmp_path: Path):
    tensors = safetensors.torch.load((saved(tmp_path) / "adapter.safetensors").read_bytes())
    assert "0/bert.encoder.layer.1.attention.self.value:v/up" in tensors
    assert "1/classifier:head/values.weight" in tensors
    assert len(tensors) == 2 * 4 + 2


def test_saving_changes_nothing_in_the_model_and_other_files_stay(tmp_path: Path):
    model = bert()
    trained(model)
    (tmp_path / "notes.txt").write_text("mine")
    before, out = look(model), logits(model)
    gw.save(model, "a", tmp_path)
    assert look(model) == before and torch.equal(logits(model), out)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_adapter_is_replaced_whole(tmp_path: Path):
    saved(tmp_path)
    model = bert()
    trained(model, methods=gw.Bottleneck(d=5), seed=3)
    gw.save(model, "a", tmp_path)
    twin = bert()
    gw.load(twin, tmp_path)
    assert torch.equal(logits(twin), logits(model))
    assert sorted(disk(tmp_path)) == ["README.md", "adapter.json", "adapter.safetensors"]


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path):
    assert disk(saved(tmp_path / "x")) == disk(saved(tmp_path / "y"))


def test_an_inactive_and_a_merged_adapter_are_saved_alike(tmp_path: Path):
    model = bert()
    trained(model, head=False)
    gw.save(model, "a", tmp_path / "active")
    gw.activate(model, None)
    gw.save(model, "a", tmp_path / "inactive")
    gw.activate(model, "a")
    gw.merge(model)
    gw.save(model, "a", tmp_path / "merged")
    assert disk(tmp_path / "active") == disk(tmp_path / "inactive") == disk(tmp_path / "merged")


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.two(self.one(x)))


def test_a_tensor_that_is_shared_is_stored_once(tmp_path: Path):
    torch.manual_seed(0)
    model, twin = Tied(), Tied()
    twin.load_state_dict(model.state_dict())
    adapter = trained(model, methods=gw.LoRA(r=2), head=False)
    one, two = adapter.deltas()
    assert isinstance(one, WeightDelta)
    two.down = one.down
    with torch.no_grad():
        two.up.copy_(one.up)
        two.up.set_(one.up)
    gw.save(model, "a", tmp_path)
    size = (tmp_path / "adapter.safetensors").stat().st_size
    assert size < 4 * 2 * 2 * 16 + 400
    gw.load(twin, tmp_path)
    x = torch.randn(3, 16)
    assert torch.equal(model(x), twin(x))


def test_no_more_bytes_than_trained(tmp_path: Path):
    """At most 1.05 of the trained bytes and 4 kB, on layers of a real size."""
    model = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 2))
    adapter = gw.graft(model, gw.LoRA(r=8, at="linear"), head=False)
    gw.save(model, "default", tmp_path)
    size = sum((tmp_path / name).stat().st_size for name in ("adapter.safetensors", "adapter.json"))
    assert size <= 1.05 * 4 * adapter.num_parameters + 4096


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, value: float):
    saved(tmp_path / "x")
    before = disk(tmp_path)
    model = bert()
    adapter = trained(model)
    with torch.no_grad():
        next(adapter.deltas()).up[0, 0] = value
    with pytest.raises(gw.GraftError, match=r"bert\.encoder\.layer\.0\.attention\.self\.query:q/up.*(?s:.*)not finite"):
        gw.save(model, "a", tmp_path / "x")
    assert disk(tmp_path) == before


def test_the_meta_device_has_nothing_to_save(tmp_path: Path):
    model = bert().to("meta")
    gw.graft(model, gw.LoRA(r=3), "a")
    with pytest.raises(gw.GraftError, match="meta device"):
        gw.save(model, "a", tmp_path / "x")
    assert disk(tmp_path) == {}


def test_an_unknown_adapter_is_refused_by_its_nearest_name(tmp_path: Path):
    model = bert()
    trained(model, "sst2")
    with pytest.raises(gw.GraftError, match="did you mean 'sst2'"):
        gw.save(model, "sst", tmp_path / "x")
    assert disk(tmp_path) == {}


def test_metadata_that_json_cannot_hold_is_named(tmp_path: Path):
    model = bert()
    trained(model).metadata = {"data": {"path": Path("x")}}
    with pytest.raises(gw.GraftError, match=re.escape("metadata['data']['path']")):
        gw.save(model, "a", tmp_path / "x")
    assert disk(tmp_path) == {}


def test_a_file_in_the_place_of_the_folder(tmp_path: Path):
    (tmp_path / "x").write_text("mine")
    model = bert()
    trained(model)
    with pytest.raises(gw.GraftError, match="a file of that name"):
        gw.save(model, "a", tmp_path / "x")
    with pytest.raises(gw.GraftError, match="found: Not a directory"):
        gw.save(model, "a", tmp_path / "x" / "y")
    assert disk(tmp_path) == {"x": b"mine"}


CALLS = ["open", "write", "fsync", "replace", "link", "mkdir"]
FAULTS = {
    "disk full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "no permission": lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    "interrupt": lambda: KeyboardInterrupt(),
}


class Fault:
    """Lets the system calls of a save through until the n-th, which fails; afterwards all goes well again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.left, self.error, self.log = at, error, []
        for name in ("fsync", "replace", "link"):
            monkeypatch.setattr(os, name, self._through(getattr(os, name), name))
        monkeypatch.setattr(Path, "mkdir", self._through(Path.mkdir, "mkdir"))
        monkeypatch.setattr(builtins, "open", self._open(builtins.open))

    def _count(self, name: str) -> None:
        self.log.append(name)
        self.left -= 1
        if self.left == 0:
            raise self.error

    def _through(self, call, name: str):
        def counted(*args, **kwargs):
            self._count(name)
            return call(*args, **kwargs)

        return counted

    def _open(self, call):
        def opened(path, mode="r", *args, **kwargs):
            if "w" not in mode:
                return call(path, mode, *args, **kwargs)
            self._count("open")
            file = call(path, mode, *args, **kwargs)
            write = file.write

            class Written:
                """A file whose write may stop half-way."""

                def __enter__(inner):
                    return inner

                def __exit__(inner, *_):
                    file.close()

                def write(inner, data):
                    write(data[: len(data) // 2])
                    self._count("write")
                    return write(data[len(data) // 2 :])

                def flush(inner):
                    file.flush()

                def fileno(inner):
                    return file.fileno()

            return Written()

        return opened


def calls_of_a_save(monkeypatch: pytest.MonkeyPatch, model: nn.Module, folder: Path) -> int:
    with monkeypatch.context() as patch:
        fault = Fault(patch, 10**6, OSError())
        gw.save(model, "a", folder)
    return len(fault.log)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("existing", [True, False], ids=["over an old one", "into a new folder"])
def test_a_failure_at_any_moment_leaves_the_disk_as_it_was(tmp_path: Path, monkeypatch, fault: str, existing: bool):
    """Every system call of a save fails once."""
    model = bert()
    trained(model, methods=gw.Bottleneck(d=5), seed=4)
    before = look(model)
    count = calls_of_a_save(monkeypatch, model, saved(tmp_path / "try") if existing else tmp_path / "try" / "y")
    assert count > 10
    for at in range(1, count + 1):
        home = tmp_path / str(at)
        home.mkdir()
        folder = saved(home / "x") if existing else home / "x" / "y"
        files = disk(home)
        error = FAULTS[fault]()
        with monkeypatch.context() as patch:
            log = Fault(patch, at, error).log
            try:
                gw.save(model, "a", folder)
                failed = False
            except KeyboardInterrupt:
                failed = fault == "interrupt"
            except gw.GraftError as refused:
                failed = fault != "interrupt"
                assert os.strerror(error.errno) in str(refused) and str(folder) in str(refused)
        if failed:
            assert disk(home) == files, (at, log[-1])
        else:
            # a file system without links or flushing of folders is no reason to fail
            assert log[-1] != "replace" and sorted(disk(folder)) == ["README.md", "adapter.json", "adapter.safetensors"]
            gw.load(bert(), folder)
    assert look(model) == before


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
import graftwork as gw
from store.files import bert, trained
model = bert()
trained(model, methods=gw.Bottleneck(d=5), seed=4)
left = int(sys.argv[2])
for name in ("fsync", "replace", "link"):
    def counted(*args, call=getattr(os, name), **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    setattr(os, name, counted)
for moment in range(1, 100):
    child = os.fork()
    if child == 0:
        left = moment
        gw.save(model, "a", Path(sys.argv[1]) / str(moment))
        os._exit(7)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7:
        print(moment)
        break
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_adapter(tmp_path: Path):
    for moment in range(1, 16):
        saved(tmp_path / str(moment))
    old, new = bert(), bert()
    trained(old)
    trained(new, methods=gw.Bottleneck(d=5), seed=4)
    command = [sys.executable, "-c", KILLED, str(tmp_path), "1000000", str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    last = int(done.stdout)
    assert 8 <= last <= 15
    found = []
    for moment in range(1, last + 1):
        model = bert()
        gw.load(model, tmp_path / str(moment))
        is_old, is_new = (torch.equal(logits(model), logits(m)) for m in (old, new))
        assert is_old != is_new
        found.append(is_new)
        # the next save cleans up
        gw.save(new, "a", tmp_path / str(moment))
        assert sorted(disk(tmp_path / str(moment))) == ["README.md", "adapter.json", "adapter.safetensors"]
    assert found == sorted(found) and not found[0] and found[-1]
