"""What the checks of methods share that start inside of the weight: the pieces of W, and a few steps of training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from weight_models import dense

import graftwork as gw


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def first(delta) -> Tensor:
    """s B_0 A_0, the part of W that is held by the frozen term."""
    return delta.scale * delta.first_up @ delta.first_down


def by_site(model: nn.Module, name: str = "default"):
    """(W, delta) of every site."""
    for part in gw.adapters(model)[name].parts:
        for site in part.sites:
            yield dense(model, site.key).detach(), part.deltas[site.key]


def train(model: nn.Module, x: Tensor, steps: int = 3, lr: float = 0.02) -> None:
    """Some steps of Adam on a loss that no backbone has reached."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    target = torch.randn(model(x).logits.shape, generator=torch.Generator().manual_seed(9))
    for _ in range(steps):
        (model(x).logits - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the backbone's own tensors."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "graft" not in n.split(".")}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = weights(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[n], before[n]) for n in before)
