"""One line grafts onto anything: what is found in five kinds of model, and what each adapter costs. Runs in seconds, no download."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel, BertConfig, LlamaConfig, T5Config, ViTConfig

import graftwork as gw


def models() -> dict[str, nn.Module]:
    """Real architectures without weights: the meta device allocates nothing."""
    with torch.device("meta"):
        return {
            "BERT": AutoModel.from_config(BertConfig()),
            "Llama 7B": AutoModel.from_config(LlamaConfig()),
            "T5": AutoModel.from_config(T5Config()),
            "ViT": AutoModel.from_config(ViTConfig()),
            "torch's own encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8), 6),
            "a convolutional net": nn.Sequential(
                nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(64, 10)
            ),
        }


def main() -> None:
    methods = {"LoRA": gw.LoRA(r=8), "bottleneck": gw.Bottleneck(reduction=16), "IA3": gw.IA3(), "BitFit": gw.BitFit()}
    for name, model in models().items():
        total = sum(p.numel() for p in model.parameters())
        print(f"\n{name}: {total:,} parameters; roles {', '.join(gw.anatomy(model).roles)}")
        for label, method in methods.items():
            try:
                adapter = gw.graft(model, method, name=label, head=False)
            except gw.GraftError as error:
                print(f"  {label:<12} {error.found}")
                continue
            roles = sorted({site.role for site in adapter.sites})
            share = 100 * adapter.num_parameters / total
            print(
                f"  {label:<12} {adapter.num_parameters:>12,}  {share:6.3f} %  {len(adapter.sites)} sites: {', '.join(roles)}"
            )


if __name__ == "__main__":
    main()
