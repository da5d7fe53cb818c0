"""A causal language model: a tiny one learns the standard library's docstrings letter by letter, is frozen, and is taught to shout.

Shows generation with an adapter, switching it off, merging, and that a key-value cache changes nothing.
"""

from __future__ import annotations

import torch
from docstrings import read
from transformers import LlamaConfig, LlamaForCausalLM

import graftwork as gw

LENGTH = 64


def batches(text: str, steps: int, size: int = 16):
    data = torch.tensor([min(ord(c), 127) for c in text])
    for _ in range(steps):
        starts = torch.randint(0, len(data) - LENGTH, (size,))
        yield torch.stack([data[s : s + LENGTH] for s in starts.tolist()])


def train(model: torch.nn.Module, text: str, steps: int, lr: float) -> float:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for ids in batches(text, steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    return loss.item()


def complete(model: LlamaForCausalLM, prompt: str, cache: bool = True) -> str:
    ids = torch.tensor([[ord(c) for c in prompt]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, use_cache=cache, pad_token_id=0
    )
    return "".join(map(chr, out[0].tolist()))


def main() -> None:
    torch.manual_seed(0)
    text = "\n".join(d.text for d in read())
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    print(f"backbone: loss {train(model, text, steps=400, lr=2e-3):.2f}")
    print(" ", complete(model, "Return the "))

    adapter = gw.graft(
        model, [gw.LoRA(r=8, at="q, k, v, o, gate, up, down"), gw.BitFit(at="up, down", add_missing=True)], name="shout"
    )
    print(adapter)
    print(f"adapter: loss {train(model, text.upper(), steps=300, lr=5e-3):.2f}")
    shouted = complete(model, "RETURN THE ")
    print(" ", shouted)
    assert shouted == complete(model, "RETURN THE ", cache=False)
    with gw.using(model, None):
        print(" ", complete(model, "Return the "), "   (switched off)")
    gw.merge(model)
    print(" ", complete(model, "RETURN THE "), "   (merged)")


if __name__ == "__main__":
    main()
