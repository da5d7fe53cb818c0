"""A small vision transformer for the digits, pretrained on the spot: on the training rows' images turned by 90, 180 and 270 degrees.

The upright images, and the rows of dev and test, are never seen. To adapt it is to learn that digits can stand upright.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ..train.data import read
from .tasks import TRAIN

SIDE, PATCH, WIDTH, LAYERS, HEADS, INNER = 8, 2, 192, 4, 6, 768
EPOCHS, BATCH, RATE = 6, 64, 1e-3


def backbone(data: Path, folder: Path, say: Callable[[str], None], epochs: int = EPOCHS) -> Path:
    """The pretrained backbone in `folder`, made from data/train.parquet if it is not there. [1.8M parameters]"""
    if folder.is_dir():
        return folder
    rows = read(str(data / TRAIN))["train"]
    images = torch.tensor(rows["image"], dtype=torch.float32)  # [rows, 8, 8]
    labels = torch.tensor([int(label) for label in rows["label"]])
    say(f"pretraining a small vision transformer on {3 * len(labels):,} turned digits, once")
    model = _pretrained(images / 127.5 - 1, labels, epochs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    model.save_pretrained(beside)  # type: ignore[operator]
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(beside)
    try:
        os.rename(beside, folder)
    except OSError:  # another process was faster
        shutil.rmtree(beside)
    return folder


def _pretrained(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Module:
    """The backbone without its head, after `epochs` passes over the turned images in [-1, 1]."""
    turned = torch.cat([torch.rot90(images, k, (1, 2)) for k in (1, 2, 3)])[:, None].expand(-1, 3, -1, -1)
    names = labels.repeat(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
        )
        config.num_labels = 10
        model = ViTForImageClassification(config).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
        steps = epochs * -(-len(turned) // BATCH)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=max(steps, 2))
        for _ in range(epochs):
            for rows in torch.randperm(len(turned)).split(BATCH):
                loss = nn.functional.cross_entropy(model(pixel_values=turned[rows]).logits, names[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                rate.step()
    model.classifier = nn.Identity()  # a head of its own is made for the task
    return model.vit  # type: ignore[no-any-return]
