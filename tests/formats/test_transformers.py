"""transformers' own reader of adapters, `model.load_adapter`, takes what is exported here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest

import graftwork as gw

from .peers import loaded, model, outputs, peer, perturb, read_by_peer, written

EXPORTED: dict[str, tuple[str, Any]] = {
    "lora": ("llama", gw.LoRA(r=3, alpha=5, at="q, v, up")),
    "lora_rslora": ("biased", gw.LoRA(r=3, at="linear", rslora=True, bias=True)),
    "lora_conv1d": ("gpt2", gw.LoRA(r=2, at="qkv, down")),
    "lora_with_head": ("bert", [gw.LoRA(r=2), gw.Full(at="head")]),
    "lora_t5": ("t5", gw.LoRA(r=2, at="q, v")),
    "lora_two_ranks": ("llama", [gw.LoRA(r=2, at="q"), gw.LoRA(r=4, alpha=4, at="down")]),
    "ia3": ("llama", gw.IA3()),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_load_adapter_reads_what_is_exported(case: str, tmp_path: Path) -> None:
    name, methods = EXPORTED[case]
    ours = model(name)
    perturb(gw.graft(ours, methods, "a").parameters())
    gw.save(ours, "a", tmp_path, format="peft")
    theirs: Any = model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = theirs.load_adapter(str(tmp_path))
    assert not (report and (report.missing_keys or report.unexpected_keys))
    bare, expected, found = outputs(model(name), name), outputs(ours, name), outputs(theirs, name)
    assert (expected - bare).abs().max() > 1e-3
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    theirs.disable_adapters()
    assert outputs(theirs, name).equal(bare)


def test_load_adapter_loses_the_magnitudes_of_dora(tmp_path: Path) -> None:
    """Of PEFT's own files too: the key of the magnitudes lacks the ending that PEFT puts there itself. Only PEFT is right."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True)
    made = peer("llama", config)
    expected = outputs(made, "llama")
    written(made, tmp_path / "theirs")
    ours = loaded("llama", tmp_path / "theirs")
    gw.save(ours, "a", tmp_path / "ours", format="peft")
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        theirs: Any = model("llama")
        report = theirs.load_adapter(str(folder))
        assert len(report.missing_keys) == 4 and all("magnitude" in key for key in report.missing_keys)
        assert (outputs(theirs, "llama") - expected).abs().max() > 1e-2
        assert (outputs(read_by_peer("llama", folder), "llama") - expected).abs().max() < 1e-5
    assert (outputs(ours, "llama") - expected).abs().max() < 1e-5
