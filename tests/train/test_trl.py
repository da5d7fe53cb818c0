"""Beside TRL: its trainers run with a grafted model, and with a folder that was exported from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from datasets import Dataset
from frozen import snapshot, unchanged
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import graftwork as gw

STEPS = 10
METHODS = {
    "lora": gw.LoRA(r=8, alpha=16, at="linear"),
    "dora": gw.DoRA(r=8, alpha=16, at="q, v, up, down"),
    "bottleneck": gw.Bottleneck(d=8),
    "prefix": gw.Prefix(length=4),
    "prompt": gw.Prompt(length=4),
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.backbone("llama", tmp_path_factory.mktemp("llama"))


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def settings(config: type[Any], folder: Path, **given: Any) -> Any:
    return config(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        max_length=32,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=given.pop("gradient_checkpointing", False),
        **given,
    )


def letters() -> Dataset:
    return Dataset.from_list(tiny.alphabets(64))


def choices() -> Dataset:
    """After a letter, the next one of the alphabet is wanted, the one before is not."""
    rows = range(64)
    at = [(tiny.LETTERS[i % 8 + 1], tiny.LETTERS[i % 8 + 2], tiny.LETTERS[i % 8]) for i in rows]
    return Dataset.from_list([{"prompt": f"{a} ", "chosen": b, "rejected": c} for a, b, c in at])


@torch.no_grad()
def moved(adapter: Any, by: float = 0.05) -> None:
    """Move what was grafted away from where it starts."""
    for p in adapter.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * by)


@torch.no_grad()
def log_probability(model: nn.Module, words: Any, row: dict[str, str], column: str) -> float:
    """Of the answer and the end that TRL puts behind it, summed, from the model's own logits."""
    prompt, whole = words(row["prompt"]).input_ids, words(row["prompt"] + row[column] + " </s>").input_ids
    likely = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(likely[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_sft_trains_a_grafted_model(method: str, checkpointing: bool, llama: Path, tmp_path: Path) -> None:
    model = opened(llama)
    adapter = gw.graft(model, METHODS[method], "a")
    before = snapshot(model, adapter)
    run = SFTTrainer(
        model=model,
        args=settings(SFTConfig, tmp_path, gradient_checkpointing=checkpointing),
        train_dataset=letters(),
        processing_class=AutoTokenizer.from_pretrained(llama),
    )
    run.train()
    assert len(losses(run)) == STEPS and losses(run)[-1] < losses(run)[0] - 0.3
    unchanged(model, adapter, before)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_models_own(method: str, llama: Path, tmp_path: Path) -> None:
    """TRL computes it around the model's forward: it calls what is below the head, and multiplies by the head's weight."""
    model = opened(llama)
    moved(gw.graft(model, METHODS[method], "a"), by=0.3)
    run = SFTTrainer(
        model=model,
        args=settings(SFTConfig, tmp_path),
        train_dataset=letters(),
        processing_class=AutoTokenizer.from_pretrained(llama),
    )
    batch = run.data_collator([run.train_dataset[i] for i in range(8)])
    own = model(**batch).loss
    with gw.using(model, None):
        bare = model(**batch).loss
    assert (own - bare).abs() > 1e-2
    assert (run.compute_loss(model, dict(batch)) - own).abs() < 1e-5


def test_dpo_with_the_adapter_switched_off_as_reference(llama: Path, tmp_path: Path) -> None:
    """TRL asks the reference once, while the trainer is made: inside `using(model, None)` that is the bare backbone."""
    model, words = opened(llama), AutoTokenizer.from_pretrained(llama)
    adapter = gw.graft(model, METHODS["lora"], "a")
    moved(adapter)  # trained before, so that it is not its own reference
    before = snapshot(model, adapter)
    args = settings(DPOConfig, tmp_path, precompute_ref_log_probs=True)
    with gw.using(model, None):
        run = DPOTrainer(model=model, args=args, train_dataset=choices(), processing_class=words)
    bare = opened(llama).eval()
    for row, found in zip(choices(), run.train_dataset, strict=True):
        for column in ("chosen", "rejected"):
            assert found[f"ref_{column}_logps"] == pytest.approx(log_probability(bare, words, row, column), abs=1e-4)
    run.train()
    assert len(losses(run)) == STEPS and losses(run)[-1] < 0.5 * losses(run)[0]
    unchanged(model, adapter, before)


def test_dpo_with_a_second_model_as_reference(llama: Path, tmp_path: Path) -> None:
    model, reference = opened(llama), opened(llama)
    adapter = gw.graft(model, METHODS["bottleneck"], "a")
    before = snapshot(model, adapter)
    run = DPOTrainer(
        model=model,
        ref_model=reference,
        args=settings(DPOConfig, tmp_path, beta=0.5),
        train_dataset=choices(),
        processing_class=AutoTokenizer.from_pretrained(llama),
    )
    run.train()
    assert len(losses(run)) == STEPS and losses(run)[-1] < 0.5 * losses(run)[0]
    unchanged(model, adapter, before)


def test_trl_does_not_see_an_adapter_of_the_output_layer(llama: Path, tmp_path: Path) -> None:
    """It multiplies by that layer's weight outside of the model's forward; PEFT's adapters are refused there for that."""
    model, words = opened(llama), AutoTokenizer.from_pretrained(llama)
    adapter = gw.graft(model, [gw.LoRA(r=2, at="q"), gw.LoRA(r=2, at="lm_head")], "a")
    before = [p.detach().clone() for p in adapter.parameters()]
    run = SFTTrainer(model=model, args=settings(SFTConfig, tmp_path), train_dataset=letters(), processing_class=words)
    run.train()
    moved = {name: not torch.equal(p, old) for (name, p), old in zip(adapter.named_parameters(), before, strict=True)}
    assert all(changed != ("lm_head" in name) for name, changed in moved.items())
    theirs = peft.get_peft_model(opened(llama), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="lm_head"):
        SFTTrainer(model=theirs, args=settings(SFTConfig, tmp_path), train_dataset=letters(), processing_class=words)


def test_an_exported_folder_goes_on_in_trl(llama: Path, tmp_path: Path) -> None:
    """What is trained here and exported is trained further there by PEFT, and read back here."""
    model, words = opened(llama).eval(), AutoTokenizer.from_pretrained(llama)
    moved(gw.graft(model, METHODS["lora"], "a"))
    gw.save(model, "a", tmp_path / "out", format="peft")
    theirs = peft.PeftModel.from_pretrained(opened(llama), str(tmp_path / "out"), is_trainable=True)
    ids = torch.tensor([words("a b c d e").input_ids])
    with torch.no_grad():
        assert (theirs.eval()(ids).logits - model(ids).logits).abs().max() < 1e-5
    for trainer, config, data in ((SFTTrainer, SFTConfig, letters()), (DPOTrainer, DPOConfig, choices())):
        run = trainer(model=theirs, args=settings(config, tmp_path / "run"), train_dataset=data, processing_class=words)
        run.train()
        assert len(losses(run)) == STEPS and losses(run)[-1] < 0.8 * losses(run)[0]
        theirs = run.model
    theirs.save_pretrained(str(tmp_path / "back"))
    again = opened(llama).eval()
    gw.load(again, tmp_path / "back")
    with torch.no_grad():
        assert (theirs.eval()(ids).logits - again(ids).logits).abs().max() < 1e-5
        assert (model(ids).logits - again(ids).logits).abs().max() > 1e-2
