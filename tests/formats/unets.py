"""A tiny U-Net and a tiny text encoder with the module names of diffusers, and LoRA added to their weights by hand."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, d: int, d_text: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(d, d, bias=False)
        self.to_k, self.to_v = nn.Linear(d_text, d, bias=False), nn.Linear(d_text, d, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(d, d), nn.Dropout(0.0)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.to_out[0](F.scaled_dot_product_attention(self.to_q(x), self.to_k(text), self.to_v(text)))


class Block(nn.Module):
    def __init__(self, d: int, d_text: int) -> None:
        super().__init__()
        self.conv1, self.proj_in = nn.Conv2d(d, d, 3, padding=1), nn.Conv2d(d, d, 1)
        self.attn2 = Attention(d, d_text)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = self.proj_in(torch.relu(self.conv1(x)))
        return x + self.attn2(h.flatten(2).mT, text).mT.reshape(h.shape)


class UNet(nn.Module):
    """pixels [batch, 3, h, w] and text [batch, tokens, 6]."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, d, 3, padding=1), nn.Conv2d(d, 3, (3, 1), stride=2)
        self.down_blocks = nn.ModuleList([Block(d, 6), Block(d, 6)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h, text)
        return self.conv_out(h)


class SelfAttention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out_proj = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.scaled_dot_product_attention(self.q_proj(x), x, self.v_proj(x)))


class TextEncoder(nn.Module):
    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(12, d)
        self.layers = nn.ModuleList([SelfAttention(d), SelfAttention(d)])

    def forward(self, ids: Tensor) -> Tensor:
        h = self.token_embedding(ids)
        for layer in self.layers:
            h = h + layer(h)
        return h


class Pipeline(nn.Module):
    """Both, under the names that they have in a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text_encoder = UNet(), TextEncoder()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, self.text_encoder(ids))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


PIXELS, TEXT, IDS = draw(2, 3, 5, 5, seed=1), draw(2, 4, 6, seed=2), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@torch.no_grad()
def run(m: nn.Module) -> Tensor:
    inputs = (PIXELS, IDS) if isinstance(m, Pipeline) else (IDS,) if isinstance(m, TextEncoder) else (PIXELS, TEXT)
    return m(*inputs)


def layers(m: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions, by path."""
    return {path: x for path, x in m.named_modules() if isinstance(x, nn.Linear | nn.Conv2d)}


def factors(m: nn.Module, path: str, r: int) -> tuple[Tensor, Tensor]:
    """A random down [r, in, *kernel] and up [out, r, 1...] of a layer."""
    w, seed = m.get_submodule(path).weight, len(path)
    return 0.3 * draw(r, *w.shape[1:], seed=seed), 0.3 * draw(w.shape[0], r, *[1] * (w.dim() - 2), seed=seed + 1)


@torch.no_grad()
def with_lora(m: nn.Module, updates: dict[str, tuple[Tensor, Tensor, float]]) -> nn.Module:
    """A copy with W' = W + s up down in the place of W, by path: (down, up, s)."""
    new = copy.deepcopy(m)
    for path, (down, up, scale) in updates.items():
        w = new.get_submodule(path).weight
        w += scale * (up.flatten(1) @ down.flatten(1)).reshape(w.shape)
    return new
