"""The gradients of a shared method, and options drawn at random, beside the peer's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

import graftwork as gw

from .peers import config_of, inputs, loaded, model, outputs, peer, read_by_peer, written
from .test_peft import CASES, close, tensors_of

# the peer trains a network that makes the rows, of which a file holds nothing; its file holds the choice and no logits to train;
# or its gradient is half of it, or that of another tensor (test_faults.py)
OTHERS = ("p_tuning", "prefix_projection", "vblora_topk", "lora_heads", "loha_effective")


@torch.no_grad()
def _become_gradients(m: torch.nn.Module, name: str, parameters: Any) -> None:
    """One backward pass; then every parameter that was trained holds its gradient, and is written as its value would be."""
    with torch.enable_grad():
        out = m(**inputs(name))
        out = (out if isinstance(out, torch.Tensor) else out.logits)[:, -7:]
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    for p in parameters:
        if p.requires_grad:
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)


@pytest.mark.parametrize("case", [case for case in CASES if case not in OTHERS])
def test_gradients_are_the_peers(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    theirs = peer(name, config)
    ours = loaded(name, written(theirs, tmp_path / "values"), trainable=True)
    _become_gradients(theirs, name, theirs.parameters())
    _become_gradients(ours, name, gw.adapters(ours)["a"].parameters())
    gw.save(ours, "a", tmp_path / "ours", format="peft")
    there, here = tensors_of(written(theirs, tmp_path / "theirs")), tensors_of(tmp_path / "ours")
    trained = [t for key, t in here.items() if not key.endswith(".zeros")]  # what PEFT stores in the place of nothing
    assert sum(t.abs().max() > 1e-6 for t in trained) > len(trained) // 2 - 1
    for key, value in here.items():
        assert (value - there[key]).abs().max() <= 1e-4 * max(1.0, there[key].abs().max().item()), key


LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@st.composite
def configs(draw: Any) -> LoraConfig:
    leaves = st.sampled_from(LEAVES)
    given = {
        "r": draw(st.integers(1, 9)),
        "lora_alpha": draw(st.sampled_from([1, 4, 7, 16])),
        "target_modules": draw(st.lists(leaves, min_size=1, max_size=4, unique=True)),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "lora_bias": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "lora_dropout": draw(st.sampled_from([0.0, 0.1])),
        "rank_pattern": draw(st.dictionaries(leaves, st.integers(1, 5), max_size=2)),
        "alpha_pattern": draw(st.dictionaries(leaves.map(lambda n: f"layers.1.*{n}"), st.integers(1, 9), max_size=2)),
        "layers_to_transform": draw(st.sampled_from([None, [0], [1], 1])),
        "exclude_modules": draw(st.sampled_from([None, ["layers.0.self_attn.q_proj"], r".*layers\.0.*proj"])),
        "modules_to_save": draw(st.sampled_from([None, ["lm_head"], ["norm", "lm_head"]])),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
    }
    assume(not (given["lora_bias"] and given["use_dora"]))  # the peer refuses it
    assume(not (given["lora_bias"] and given["init_lora_weights"] == "gaussian"))
    return LoraConfig(**given)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(configs())
def test_options_together(config: LoraConfig) -> None:
    try:
        theirs = peer("biased", config)
    except ValueError:  # every module is excluded
        return
    with tempfile.TemporaryDirectory() as place:
        folder, back = written(theirs, Path(place) / "theirs"), Path(place) / "back"
        ours = loaded("biased", folder)
        wanted = outputs(theirs, "biased")
        close(outputs(ours, "biased"), wanted)
        gw.save(ours, "a", back, format="peft")
        assert json.dumps(config_of(back), sort_keys=True) == json.dumps(config_of(folder), sort_keys=True)
        gw.adapters(ours)["a"].metadata.clear()
        gw.save(ours, "a", back, format="peft")
        close(outputs(read_by_peer("biased", back), "biased"), wanted)
        gw.remove(ours, "a")
        assert outputs(ours, "biased").equal(outputs(model("biased"), "biased"))
