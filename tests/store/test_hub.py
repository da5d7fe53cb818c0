"""Adapters pushed to a hub and loaded from it, over HTTP, against a server on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import constants
from transformers import AutoModelForSequenceClassification

import graftwork as gw
from graftwork.cli import main

from .files import bert, disk, logits, look, saved, trained
from .hub_server import READER, WRITER, Hub

COMMIT = re.compile(r"hub:me/sst2@([0-9a-f]{40})")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A server, and the settings that HF_ENDPOINT, HF_HOME and HF_TOKEN make when the library of the hub is imported."""
    made = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "".join(files[1:]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, that this server does not speak
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    yield made
    made.close()


def files_of(hub: Hub, repo: str) -> dict[str, bytes]:
    return hub.repos[repo].commits[hub.repos[repo].refs["main"]]


def peft_folder(folder: Path, **given: bool) -> Path:
    made = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    made.save_pretrained(str(folder), **given)
    return folder


def test_what_was_pushed_is_loaded(hub: Hub, tmp_path: Path) -> None:
    ours = bert()
    trained(ours)
    gw.save(ours, "a", tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine alone")
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"state")
    address = gw.push(tmp_path / "a", "me/sst2")
    assert COMMIT.fullmatch(address)
    assert {*files_of(hub, "me/sst2")} == {".gitattributes", "README.md", "adapter.json", "adapter.safetensors"}
    for where in (address, "hub:me/sst2", "hub:me/sst2@main"):
        theirs = bert()
        adapter = gw.load(theirs, where)
        assert adapter.name == "a" and logits(theirs).equal(logits(ours))
        assert adapter.metadata["hub"] == address  # whatever was asked for, the commit is kept
    assert not (logits(bert()) - logits(ours)).abs().max() < 1e-3


def test_the_commit_is_saved_and_finds_the_same_bytes_again(hub: Hub, tmp_path: Path) -> None:
    first = gw.push(saved(tmp_path / "a"), "me/sst2")
    model = bert()
    gw.load(model, "hub:me/sst2")
    gw.save(model, "a", tmp_path / "copy")
    second = gw.push(saved(tmp_path / "b", seed=5), "me/sst2")
    assert first != second
    [pin] = [json.loads((tmp_path / "copy" / "adapter.json").read_text())["metadata"]["hub"]]
    assert pin == first
    again, newer = bert(), bert()
    gw.load(again, pin)
    assert gw.load(newer, "hub:me/sst2").metadata["hub"] == second
    assert logits(again).equal(logits(model)) and not logits(newer).equal(logits(model))


def test_the_card_is_what_the_hub_reads(hub: Hub, tmp_path: Path) -> None:
    model = bert()
    model.config._name_or_path = "someone/bert-tiny"
    trained(model, methods=[gw.LoRA(r=2), gw.Bottleneck(d=2)])
    gw.save(model, "a", tmp_path / "a")
    gw.push(tmp_path / "a", "me/sst2", message="a first one")
    card = files_of(hub, "me/sst2")["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "graftwork",
        "base_model": "someone/bert-tiny",
        "base_model_relation": "adapter",
        "tags": ["graftwork", "lora", "bottleneck", "full"],
    }
    assert 'gw.load(model, "hub:me/sst2")' in card
    local = bert()
    local.config._name_or_path = str(tmp_path)  # a folder of this machine is nobody else's backbone
    trained(local)
    gw.save(local, "a", tmp_path / "local")
    assert "base_model" not in (tmp_path / "local" / "README.md").read_text().split("---\n")[1]


def test_a_recipe_with_its_adapters(hub: Hub, tmp_path: Path) -> None:
    ours = bert()
    trained(ours, "a")
    trained(ours, "soft", gw.Bottleneck(d=3), seed=1)
    gw.save(ours, "0.5*a + soft", tmp_path / "r")
    gw.activate(ours, "0.5*a + soft")
    (tmp_path / "r" / "a" / "notes.txt").write_text("mine alone")
    address = gw.push(tmp_path / "r", "me/sst2")
    own = [f"{n}/{file}" for n in ("a", "soft") for file in ("README.md", "adapter.json", "adapter.safetensors")]
    assert {*files_of(hub, "me/sst2")} == {".gitattributes", "README.md", "adapter.json", *own}
    theirs = bert()
    gw.load(theirs, "hub:me/sst2")
    assert gw.active(theirs) == "0.5*a + soft" and logits(theirs).equal(logits(ours))
    assert {a.metadata["hub"] for a in gw.adapters(theirs).values()} == {address}
    inside = {f"deep/{name}": data for name, data in files_of(hub, "me/sst2").items()}
    hub.put("me/deep", inside)
    again = bert()
    gw.load(again, "hub:me/deep:deep", "x")
    assert gw.active(again) == "0.5*x/a + x/soft" and logits(again).equal(logits(ours))
    files = dict(files_of(hub, "me/sst2"))
    for name in ("../../up", "a/b", "*"):
        evil = json.dumps(json.loads(files["adapter.json"]) | {"expression": f"a >> {json.dumps(name)}"})
        hub.put("me/evil", files | {"adapter.json": evil.encode()})
        model = bert()
        before = look(model)
        with pytest.raises(gw.GraftError, match="no folder in it"):
            gw.load(model, "hub:me/evil")
        assert look(model) == before
    (tmp_path / "r" / "soft" / "adapter.safetensors").write_bytes(b"")
    commits = len(hub.repos["me/sst2"].commits)
    with pytest.raises(gw.GraftError):
        gw.push(tmp_path / "r", "me/sst2")
    assert len(hub.repos["me/sst2"].commits) == commits


def test_branches_and_folders(hub: Hub, tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", seed=3)
    files = {f"adapters/en/{n}": data for n, data in disk(one).items()}
    hub.put("me/many", files | {f"adapters/en/old/{n}": data for n, data in disk(two).items()})
    model, there = bert(), bert()
    adapter = gw.load(model, "hub:me/many:adapters/en")
    gw.load(there, one)
    assert logits(model).equal(logits(there))
    assert adapter.metadata["hub"] == f"hub:me/many@{hub.repos['me/many'].refs['main']}:adapters/en"
    assert not any("old" in name for name in hub.sent)
    first = gw.push(one, "me/sst2")
    on_branch = gw.push(two, "me/sst2", revision="try/2")
    assert gw.load(bert(), "hub:me/sst2").metadata["hub"] == first
    assert gw.load(bert(), "hub:me/sst2@try/2").metadata["hub"] == on_branch != first


def test_other_formats_and_no_pickle_without_need(hub: Hub, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "theirs")
    extra = dict.fromkeys(("adapter_model.bin", "training_args.bin", "optimizer.pt", "pytorch_model.bin"), b"\x80\x04.")
    hub.put("me/bert-lora", {**disk(folder), **extra, "model.safetensors": b"whole", "checkpoint-1/adapter.bin": b"x"})
    model, there = bert(), bert()
    adapter = gw.load(model, "hub:me/bert-lora")
    gw.load(there, folder)
    assert adapter.name == "bert-lora" and logits(model).equal(logits(there))
    assert {*hub.sent} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    pickled = {n: data for n, data in disk(folder).items() if not n.endswith("safetensors")}
    pickled |= {"adapter_model.bin": (tmp_path / "adapter_model.bin").read_bytes(), "training_args.bin": b"no"}
    hub.put("me/old-lora", pickled)
    hub.sent.clear()
    old = bert()
    gw.load(old, "hub:me/old-lora")
    assert logits(old).equal(logits(there))
    assert {*hub.sent} == {"README.md", "adapter_config.json", "adapter_model.bin"}

    gw.push(folder, "me/again")
    assert {*files_of(hub, "me/again")} == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_what_was_downloaded_needs_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = gw.push(saved(tmp_path / "a"), "me/sst2")
    expected = bert()
    gw.load(expected, "hub:me/sst2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.seen)
    for where in ("hub:me/sst2", address):
        model = bert()
        assert gw.load(model, where).metadata["hub"] == address
        assert logits(model).equal(logits(expected))
    with pytest.raises(gw.GraftError, match="HF_HUB_OFFLINE"):
        gw.load(bert(), "hub:me/other")
    with pytest.raises(gw.GraftError, match="HF_HUB_OFFLINE"):
        gw.load(bert(), "hub:me/sst2@other")
    with pytest.raises(gw.GraftError, match="HF_HUB_OFFLINE"):
        gw.push(tmp_path / "a", "me/sst2")
    assert len(hub.seen) == asked


REFUSED = {
    "no repository": ("hub:me/none", WRITER, "no repository 'me/none'"),
    "private, nobody": ("hub:me/private", "", "no repository 'me/private' that may be seen"),
    "no revision": ("hub:me/sst2@v9", WRITER, "no branch, tag or commit 'v9'"),
    "no commit": (f"hub:me/sst2@{'0' * 40}", WRITER, "no branch, tag or commit"),
    "no folder": ("hub:me/sst2:nowhere", WRITER, "no 'nowhere' in the repository"),
    "no adapter": ("hub:me/text", WRITER, "no files of an adapter in the repository"),
    "half an adapter": ("hub:me/half", WRITER, "adapter.safetensors\n  found: missing"),
    "a path out": ("hub:me/sst2:../../x", WRITER, "not of the form hub:NAME/REPO"),
    "a pattern": ("hub:me/sst2:*", WRITER, "not of the form"),
    "no name": ("hub:", WRITER, "not of the form"),
    "three names": ("hub:a/b/c", WRITER, "not of the form"),
    "a name that cannot be": ("hub:me/-..-", WRITER, "found"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_downloaded_is_told(
    case: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, token, says = REFUSED[case]
    files = disk(saved(tmp_path / "a"))
    hub.put("me/sst2", files)
    hub.put("me/private", files, private=True)
    hub.put("me/text", {"data.txt": b"words", "model.safetensors": b"whole"})
    hub.put("me/half", {n: data for n, data in files.items() if n != "adapter.safetensors"})
    monkeypatch.setenv("HF_TOKEN", token)
    model = bert()
    before = look(model)
    with pytest.raises(gw.GraftError, match=re.escape(says)) as told:
        gw.load(model, where)
    assert told.value.do and len(str(told.value).splitlines()) <= 4
    assert look(model) == before


@pytest.mark.parametrize("cut", ["/api/models/me/sst2", "/resolve/"])
def test_a_download_that_breaks_off_is_told_and_goes_on_later(cut: str, hub: Hub, tmp_path: Path) -> None:
    gw.push(saved(tmp_path / "a"), "me/sst2")
    hub.cut = cut
    model = bert()
    before = look(model)
    with pytest.raises(gw.GraftError, match="connection failed"):
        gw.load(model, "hub:me/sst2")
    assert look(model) == before
    hub.cut = None
    gw.load(model, "hub:me/sst2")


@pytest.mark.parametrize("cut", ["/api/repos/create", "/large/", "/commit/"])
def test_an_upload_that_breaks_off_leaves_the_repository_as_it_was(cut: str, hub: Hub, tmp_path: Path) -> None:
    first = gw.push(saved(tmp_path / "a"), "me/sst2")
    commits = dict(hub.repos["me/sst2"].commits)
    hub.cut = cut
    with pytest.raises(gw.GraftError, match=r"(?s)push .*connection failed.*whole or not there"):
        gw.push(saved(tmp_path / "b", seed=4), "me/sst2")
    hub.cut = None
    assert hub.repos["me/sst2"].commits == commits
    assert gw.load(bert(), "hub:me/sst2").metadata["hub"] == first
    assert gw.push(tmp_path / "b", "me/sst2") != first


@pytest.mark.parametrize(("token", "says"), [("", "refused it (401)"), (READER, "refused it (403)")])
def test_who_may_not_write_is_told(
    token: str, says: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/there", {"a": b""})
    monkeypatch.setenv("HF_TOKEN", token)
    for repo in ("me/new", "me/there"):
        with pytest.raises(gw.GraftError, match=re.escape(says)) as told:
            gw.push(saved(tmp_path / "a"), repo)
        assert "log in" in told.value.do
    assert {*hub.repos} == {"me/there"} and len(hub.repos["me/there"].commits) == 1


def test_private_means_private(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a")
    gw.push(folder, "me/mine", private=True)
    assert hub.repos["me/mine"].private
    gw.push(folder, "me/mine", private=True)
    gw.push(folder, "me/all")
    before = dict(hub.repos["me/all"].commits)
    with pytest.raises(gw.GraftError, match="there already, and public"):
        gw.push(folder, "me/all", private=True)
    assert hub.repos["me/all"].commits == before
    monkeypatch.setenv("HF_TOKEN", READER)
    gw.load(bert(), "hub:me/mine")


def test_no_adapter_no_push(hub: Hub, tmp_path: Path) -> None:
    broken = saved(tmp_path / "broken")
    (broken / "adapter.safetensors").write_bytes(b"cut")
    (tmp_path / "empty").mkdir()
    pickled = peft_folder(tmp_path / "pickled", safe_serialization=False)
    for folder, repo, says in (
        (broken, "me/sst2", "truncated"),
        (tmp_path / "empty", "me/sst2", "no adapter there; it holds nothing"),
        (tmp_path / "nowhere", "me/sst2", "no adapter there"),
        (pickled, "me/sst2", "no adapter there; it holds README.md, adapter_config.json, adapter_model.bin"),
        (saved(tmp_path / "a"), "sst2", "no name of a repository"),
    ):
        with pytest.raises(gw.GraftError, match=re.escape(says)):
            gw.push(folder, repo)
    assert not hub.seen


def test_commands_take_addresses(hub: Hub, tmp_path: Path) -> None:
    """As a user types them, in a process of its own with the environment's settings."""
    bert().save_pretrained(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    trained(model)
    gw.save(model, "a", tmp_path / "a")
    words = [
        ["push", str(tmp_path / "a"), "me/sst2", "--private"],
        ["show", "hub:me/sst2"],
        ["export", "hub:me/sst2", "--format", "peft", "--out", str(tmp_path / "peft")],
        ["push", str(tmp_path / "peft"), "me/sst2-peft"],
        ["import", "hub:me/sst2-peft", "--out", str(tmp_path / "back")],
        ["show", "hub:me/none"],
    ]
    code = f"from graftwork.cli import main\nfor w in {words!r}: print('exit', main(w), flush=True)"
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
    settings |= {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **settings})
    assert re.findall("exit (.)", done.stdout) == ["0", "0", "0", "0", "0", "2"], done.stderr
    assert COMMIT.match(done.stdout) and "no repository 'me/none'" in done.stderr and "Traceback" not in done.stderr
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    gw.load(back, tmp_path / "back")
    assert (logits(back) - logits(model)).abs().max() < 1e-6
    pin = json.loads((tmp_path / "back" / "adapter.json").read_text())["metadata"]["hub"]
    assert pin == f"hub:me/sst2-peft@{hub.repos['me/sst2-peft'].refs['main']}"


def test_the_command_says_what_went_wrong(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path), "me/sst2"]) == 2
    assert "no adapter there; it holds nothing" in capsys.readouterr().err
