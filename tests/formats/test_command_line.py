"""graftwork export and import, on folders that name their backbone and on folders that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig

import graftwork as gw
from graftwork.cli import main

from .peers import loaded, model, outputs, peer, read_by_peer, written


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("backbone")
    model("llama").save_pretrained(place)
    return place


@pytest.fixture
def theirs(backbone: Path, tmp_path: Path) -> Path:
    """A folder of the peer's that names its backbone."""
    made = peer("llama", LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made.peft_config["default"].base_model_name_or_path = str(backbone)
    return written(made, tmp_path / "theirs")


def test_there_and_back_on_the_command_line(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = outputs(loaded("llama", theirs), "llama")
    assert main(["import", str(theirs), "--out", str(tmp_path / "own")]) == 0
    assert "lora(" in capsys.readouterr().out
    assert outputs(loaded("llama", tmp_path / "own"), "llama").equal(wanted)
    assert main(["show", str(tmp_path / "own")]) == 0
    assert main(["export", str(tmp_path / "own"), "--format", "peft", "--out", str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == json.loads(
        (theirs / "adapter_config.json").read_text()
    )
    assert (outputs(read_by_peer("llama", tmp_path / "back"), "llama") - wanted).abs().max() < 1e-5
    assert main(["export", str(theirs), "--format", "peft", "--out", str(tmp_path / "copy")]) == 0  # any format goes in


def test_an_adapter_saved_in_python_knows_its_backbone(backbone: Path, tmp_path: Path) -> None:
    import transformers

    m = transformers.AutoModelForCausalLM.from_pretrained(backbone)
    gw.graft(m, gw.IA3(), "mine")
    gw.save(m, "mine", tmp_path / "own")
    assert main(["export", str(tmp_path / "own"), "--format", "peft", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "IA3"


def test_what_cannot_be_done_is_said(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    assert "did you mean 'peft'" in fails("export", str(theirs), "--format", "pefft", "--out", out)
    assert "no folder of that name" in fails(
        "import", str(theirs), "--out", out, "--backbone", str(tmp_path / "nowhere")
    )
    path = theirs / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    assert "--backbone" in fails("import", str(theirs), "--out", out)
    assert not Path(out).exists()


def test_partial(theirs: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = theirs / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj", "v_proj"]}))
    assert main(["import", str(theirs), "--out", str(tmp_path / "own")]) == 2
    assert "v_proj.lora_A.weight" in capsys.readouterr().err
    assert main(["import", str(theirs), "--out", str(tmp_path / "own"), "--partial"]) == 0
    assert "v_proj.lora_A.weight" in capsys.readouterr().out.replace("\n", "")
    wanted = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert [site.path for site in gw.adapters(loaded("llama", tmp_path / "own"))["a"].sites] == wanted
