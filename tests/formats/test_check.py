"""`check` says what files hold and what is wrong with them; what it says of the peer, the peer does."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graftwork as gw
from graftwork.cli import main
from graftwork.formats.check import adapterhub, check

from .peers import loaded, model, outputs, peer, perturb, read_by_peer, written
from .test_peft import CASES, POLY, tensors_of

LAYER = "base_model.model.model.layers"
Q = f"{LAYER}.0.self_attn.q_proj"
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of the peer's for the tiny Llama."""
    return written(peer("llama", LORA), tmp_path / "theirs")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """Change tensors and fields of the config."""
    tensors = tensors_of(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_what_a_folder_holds(theirs: Path) -> None:
    report = check(theirs)
    assert (report.format, report.model, report.loads, report.finite) == ("peft", "AutoModelForCausalLM", None, True)
    assert report.said.methods == ["LORA"] and not report.said.problems and not report.said.ignored
    assert {k: report.said.options[k] for k in ("r", "lora_alpha")} == {"r": 4, "lora_alpha": 8}
    assert report.parameters == 2 * (4 * (24 + 24) + 4 * (40 + 24)) and report.bytes == 4 * report.parameters
    assert (report.ranks, report.widths, report.layers, report.dtypes) == ([4], [24, 40], [0, 1], ["float32"])
    found = {(g.name, g.count, g.shape, g.parameters) for g in report.groups}
    assert (f"{LAYER}.*.mlp.down_proj.lora_A.weight", 2, (4, 40), 320) in found and len(found) == 4
    assert report.files["adapter_model.safetensors"] == (theirs / "adapter_model.safetensors").stat().st_size
    backbone = model("llama")
    before, size = outputs(backbone, "llama"), sum(p.numel() for p in backbone.parameters())
    tried = check(theirs, backbone)
    assert tried.loads and tried.onto == "LlamaForCausalLM" and tried.share == pytest.approx(report.parameters / size)
    assert [m.split("(")[0] for m in tried.said.methods] == ["lora"]
    assert outputs(backbone, "llama").equal(before) and not any("graft" in name for name, _ in backbone.named_modules())


def test_our_own_folder(tmp_path: Path) -> None:
    m = model("llama")
    perturb(gw.graft(m, [gw.LoRA(r=2), gw.Bottleneck(d=3)], "mine").parameters())
    gw.save(m, "mine", tmp_path)
    report = check(tmp_path)
    assert (report.format, report.model, report.loads) == ("graftwork", "LlamaForCausalLM", None)
    assert [text.split("(")[0] for text in report.said.methods] == ["lora", "bottleneck"]
    adapter = gw.adapters(m)["mine"]
    assert report.parameters == adapter.num_parameters and 0 < report.share < 1
    assert check(tmp_path, model("llama")).loads is True
    other = check(tmp_path, model("gpt2"))
    assert other.loads is False and any("another structure" in p for p in other.said.problems)


@pytest.mark.parametrize("case", [*CASES, *POLY])
def test_nothing_is_said_against_what_the_peer_writes(case: str, tmp_path: Path) -> None:
    name, config = (CASES | POLY)[case]
    folder = written(peer(name, config), tmp_path)
    for report in (check(folder), check(folder, model(name))):
        assert not report.said.problems and report.loads is not False
        assert all("magnitudes of DoRA" in text for text in report.said.ignored)


STRAY = {
    "another layer": ({f"{LAYER}.7.self_attn.q_proj.lora_A.weight": (4, 24)}, {}, None),
    "no target": ({f"{LAYER}.0.self_attn.k_proj.lora_A.weight": (4, 24)}, {}, "no such module as a target"),
    "no prefix": ({"layers.0.self_attn.q_proj.lora_A.weight": (4, 24)}, {}, "do not begin with"),
    "another method": ({f"{Q}.ia3_l": (24, 1)}, {}, "of another method than LORA"),
    "magnitudes, no DoRA": ({f"{Q}.lora_magnitude_vector": (24,)}, {}, "of an option that is off"),
    "a bias, no lora_bias": ({f"{Q}.lora_B.bias": (24,)}, {}, "of an option that is off"),
    "a pattern": ({}, {"alpha_pattern": {"v_proj": 3}}, "in alpha_pattern: they match no module of the file: v_proj"),
}


@pytest.mark.parametrize("case", STRAY)
def test_what_is_said_to_be_ignored_the_peer_ignores(case: str, theirs: Path) -> None:
    shapes, config, says = STRAY[case]
    before = outputs(read_by_peer("llama", theirs), "llama")
    edit(theirs, lambda t: t.update({key: torch.ones(shape) for key, shape in shapes.items()}), **config)
    assert outputs(read_by_peer("llama", theirs), "llama").equal(before)
    report = check(theirs)
    if says is not None:  # that the backbone has no layer 7, the files alone do not tell
        assert [text for text in report.said.ignored if says in text], report.said
    tried = check(theirs, model("llama"))
    if shapes:
        assert tried.loads is False and next(iter(shapes)) in str(tried.said.problems)
        assert any("with --partial it loads" in note for note in tried.said.notes)
        with pytest.warns(UserWarning, match="left out"):
            assert (outputs(loaded("llama", theirs, partial=True), "llama") - before).abs().max() < 1e-5
    else:
        assert tried.loads


def test_what_is_said_to_replace_a_weight_replaces_it(theirs: Path) -> None:
    bare = outputs(model("llama"), "llama")
    edit(theirs, lambda t: t.update({"base_model.model.model.norm.weight": torch.arange(24.0)}))
    changed = read_by_peer("llama", theirs)
    with changed.disable_adapter():
        assert (outputs(changed, "llama") - bare).abs().max() > 0.1
    [note] = check(theirs).said.notes
    assert "replace weights of the backbone itself: base_model.model.model.norm.weight" in note
    ours = loaded("llama", theirs)
    assert (outputs(ours, "llama") - outputs(changed, "llama")).abs().max() < 1e-5
    with gw.using(ours, None):  # here they are the adapter's, and go with it
        assert outputs(ours, "llama").equal(bare)


def test_a_half_trained_pair_and_ranks_that_differ(theirs: Path) -> None:
    edit(theirs, lambda t: t.pop(f"{Q}.lora_B.weight"))
    report = check(theirs)
    assert report.loads is False
    [problem] = report.said.problems
    assert problem.startswith("1 missing; PEFT leaves them untrained: ") and "q_proj.lora_B" in problem
    edit(theirs, lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(24, 4)}), rank_pattern={"down_proj": 3})
    assert sum("has rank 4, the config says 3" in p for p in check(theirs).said.problems) == 2


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """Damaged copies of a folder, and what is to be said of each."""
    made = {}

    def copy(name: str, says: str) -> Path:
        made[name] = (folder.parent / name, says)
        shutil.copytree(folder, made[name][0])
        return made[name][0]

    data = (folder / "adapter_model.safetensors").read_bytes()
    (copy("cut", "damaged") / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    (copy("header", "truncated") / "adapter_model.safetensors").write_bytes(b"\xff" * 8 + data[8:])
    (copy("json", "damaged") / "adapter_config.json").write_text('{"peft_type": "LORA", ')
    (copy("twice", "stands twice") / "adapter_config.json").write_text('{"peft_type": "LORA", "peft_type": "IA3"}')
    (copy("type", "did you mean 'LORA'") / "adapter_config.json").write_text('{"peft_type": "LORRA"}')
    (copy("kind", "'target_modules' is 5") / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "target_modules": 5}'
    )
    (copy("empty", "no tensors") / "adapter_model.safetensors").unlink()
    edit(
        copy("wild", "1 of 8 tensors hold numbers that are not finite"),
        lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan),
    )
    nothing = folder.parent / "nothing"
    nothing.mkdir()
    return made | {"nothing": (nothing, "no adapter of a format"), "nowhere": (folder / "nowhere", "no such folder")}


def test_damage_is_said_and_nothing_raised(theirs: Path) -> None:
    for name, (folder, says) in broken(theirs).items():
        for report in (check(folder), check(folder, model("llama"))):
            assert report.loads is False and any(says in p for p in report.said.problems), (name, report.said.problems)
    assert check(theirs.parent / "wild").finite is False
    assert check("hub:no such/address").loads is False


def test_pickles_are_named_and_not_opened(theirs: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (theirs / "extra.pkl").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    torch.save(tensors_of(theirs), theirs / "adapter_model.bin")
    report = check(theirs)
    assert report.pickles == ["adapter_model.bin", "extra.pkl"]
    assert report.said.ignored == ["adapter_model.bin: adapter_model.safetensors is read in its place"]
    (theirs / "adapter_model.safetensors").unlink()
    (theirs / "extra.pkl").unlink()
    good = check(theirs, model("llama"))
    assert good.loads and good.parameters == report.parameters
    code = f"cos\nsystem\n(S'touch {mark}'\ntR."
    (theirs / "adapter_model.bin").write_bytes(code.encode())
    bad = check(theirs, model("llama"))
    assert bad.loads is False and not mark.exists() and any("adapter_model.bin" in p for p in bad.said.problems)


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(peer("llama", LORA), tmp_path_factory.mktemp("seeds") / "seed")


values = st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=6) | st.just([None]) | st.just({"": []})


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_file_makes_it_fail(data: st.DataObject, seed: Path) -> None:
    config = json.loads((seed / "adapter_config.json").read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=3)):
        config[name] = data.draw(values)
    raw = bytearray((seed / "adapter_model.safetensors").read_bytes())
    for at in data.draw(st.lists(st.integers(0, 1500), max_size=3)):
        raw[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "adapter_config.json").write_text(json.dumps(config))
        (Path(place) / "adapter_model.safetensors").write_bytes(raw)
        told = check(place).to_json()
    assert json.loads(json.dumps(told))["format"] == "peft"


def test_the_command(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = tmp_path / "llama"
    model("llama").save_pretrained(backbone)
    model("gpt2").save_pretrained(tmp_path / "gpt2")
    assert main(["check", str(theirs)]) == 0
    text = capsys.readouterr().out
    for part in ("peft", "AutoModelForCausalLM", "q_proj", "896", "nothing in the files speaks against it"):
        assert part in text.replace("\n", " "), part
    assert main(["check", str(theirs), "--backbone", str(backbone)]) == 0
    assert "loads onto LlamaForCausalLM" in capsys.readouterr().out
    assert main(["check", str(theirs), "--backbone", str(tmp_path / "gpt2")]) == 1
    assert "does not load onto" in capsys.readouterr().out
    assert main(["check", str(theirs), "--backbone", str(tmp_path / "none")]) == 1
    capsys.readouterr()
    assert main(["check", str(theirs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "peft" and told["options"]["r"] == 4 and told["problems"] == [] and told["loads"] is None
    (theirs / "adapter_model.safetensors").write_bytes(b"")
    assert main(["check", str(theirs)]) == 1
    assert "does not load" in capsys.readouterr().out


HUB = {"name": "a", "version": "adapters.1.3.0", "model_class": "BertModel", "model_name": "x"}
LORA_KEY = "encoder.layer.0.attention.self.query.loras.a.lora_A"


def hub_folder(folder: Path, config: dict[str, Any], keys: list[str], **about: Any) -> adapterhub.Said:
    """What is said of a folder of AdapterHub's with tensors of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**HUB, **about, "config": config}))
    return adapterhub.said(folder, {key: torch.ones(2, 4) for key in keys})


def test_what_the_adapters_library_leaves_out(tmp_path: Path) -> None:
    """As its loader does: unexpected keys are logged, and only modules under the adapter's name are asked for theirs."""
    lora = {"architecture": "lora", "r": 8, "alpha": 8}
    good = hub_folder(tmp_path, lora, [LORA_KEY, "shared_parameters.a.x"])
    assert good.methods == ["lora named 'a'"] and good.options == lora
    assert not (good.problems or good.ignored or good.notes)
    stray = hub_folder(tmp_path, lora, [LORA_KEY.replace(".a.", ".b."), LORA_KEY.replace("loras", "refts")])
    assert [text.partition(": ")[0] for text in stray.ignored] == [
        "1 not under the name 'a'",
        "1 of a kind that the config does not build",
    ]
    union = {"architecture": "union", "configs": [lora, {"architecture": "reft", "r": 1}]}
    both = hub_folder(tmp_path, union, [LORA_KEY, LORA_KEY.replace("loras", "refts")])
    assert len(both.methods) == 2 and both.options["reft.r"] == 1 and not both.ignored
    old = hub_folder(tmp_path, {**lora, "alpha": 16}, [LORA_KEY], version="adapters.1.0.1")
    assert old.notes == ["made by adapters.1.0.1: the scale of its LoRA is 1, whatever alpha says"]
    (tmp_path / "head_config.json").write_text("{}")
    assert hub_folder(tmp_path, lora, [LORA_KEY]).ignored == ["head_config.json: the head's tensors are missing"]
    assert hub_folder(tmp_path / "none", lora, [], name=None).problems == ["adapter_config.json: no name, or no config"]
