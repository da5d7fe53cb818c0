"""transformers.Trainer, as it is, trains what is grafted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from frozen import rows, snapshot, unchanged
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import graftwork as gw


def trainer(made: nn.Module, folder: Path, **given: Any) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=10,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **given,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in torch.tensor(rows(8))]
    return Trainer(model=made, args=settings, train_dataset=data)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plain_trainer_trains_the_adapter_alone(checkpointing: bool, tmp_path: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(tiny.backbone("llama", tmp_path / "llama"))
    adapter = gw.graft(made, gw.LoRA(r=4, at="linear"), "a")
    before = snapshot(made, adapter)
    run = trainer(made, tmp_path, gradient_checkpointing=checkpointing)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    unchanged(made, adapter, before)
