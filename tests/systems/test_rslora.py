"""Kalajdzievski 2023: LoRA scaled by alpha / sqrt(r). Forward, size and own file are checked beside LoRA's, in test_lora.py."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_models import ids, llama, spread
from peft import LoraConfig, PeftModel, get_peft_model
from started import close
from weight_models import counts, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("rslora")


@pytest.mark.parametrize("how", ["svd", "cat", "linear"])
def test_rslora__what_is_merged_has_no_scale_left(how):
    """The peer copies the flag into a merged adapter with alpha = r, and is sqrt(r) times too large."""
    model, x = llama(), ids()
    for name, seed in (("a", 1), ("b", 2)):
        spread(gw.graft(model, gw.RSLoRA(r=4), name, head=False, seed=seed))
    base = model.get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    deltas = [gw.adapters(model)[n].parts[0].deltas["model.layers.0.self_attn.q_proj:q"] for n in "ab"]
    both = sum(d.weight(base) - base for d in deltas).detach()
    gw.combine(model, "c", {"a": 1.0, "b": 1.0}, how=how)
    (method, *_) = gw.adapters(model)["c"].methods
    assert method.scale == 1 and not method.rslora
    if how != "linear":  # which is near to the sum where the factors are alike
        (delta, *_) = gw.adapters(model)["c"].deltas()
        close(delta.weight(base) - base, both, 1e-4)
    assert torch.isfinite(model(x).logits).all()


def test_rslora__a_file_of_several_ranks_has_the_scale_of_each(tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"],
                        rank_pattern={"v_proj": 9}, init_lora_weights=False)  # fmt: skip
    torch.manual_seed(0)
    theirs, x = get_peft_model(llama(), copy.deepcopy(config)).eval(), ids()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = llama()
    adapter = gw.load(model, tmp_path / "theirs", "a")
    assert {d.scale for d in adapter.deltas()} == {6 / 2, 6 / 3}
    close(model(x).logits, theirs(x).logits)
    adapter.metadata.clear()
    gw.save(model, "a", tmp_path / "ours", format="peft")
    close(PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()(x).logits, model(x).logits)


def test_rslora__counts():
    assert counts(roberta_of("base"), *gw.RSLoRA(r=8)) == (294_912, 294_912)
