"""A real pretrained backbone (MiniLM) on real sentences (SST-2): what is trained beats chance by far, and survives its file."""

from __future__ import annotations

from pathlib import Path

import torch

import graftwork as gw
from graftwork.train import DataSettings, FitSettings, TrainSettings, train
from graftwork.train.trained import open_trained


def test_lora_on_minilm_learns_sst2(minilm: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sst2"
    settings = TrainSettings(
        backbone=minilm,
        out=str(out),
        method="lora(r=8, at='q, k, v, o, up, down')",
        data=DataSettings(
            data=str(data / "sst2" / "train.tsv"), eval_data=str(data / "sst2" / "dev.tsv"), max_length=48, max_rows=800
        ),
        fit=FitSettings(epochs=1, batch=16, lr=2e-3, seed=0),
    )
    result = train(settings)
    # 0.79 when this was written; a frozen backbone with a fresh head stands at about 0.5
    assert result.metrics["accuracy"] > 0.72
    assert result.parameters < 0.02 * result.backbone_parameters

    opened = open_trained(out)
    rows = [{"text": "a gorgeous, witty, seductive movie"}, {"text": "a dull, lifeless and painful mess"}]
    answers = [row["label"] for row in opened.predict(rows)]
    assert answers == ["positive", "negative"]
    batch = opened.processor([r["text"] for r in rows], padding=True, return_tensors="pt")
    result.model.eval()
    with torch.inference_mode():
        trained, again = result.model(**batch).logits, opened.model(**batch).logits
        assert torch.equal(trained, again)
        gw.merge(opened.model)
        torch.testing.assert_close(opened.model(**batch).logits, again, atol=1e-4, rtol=1e-4)
