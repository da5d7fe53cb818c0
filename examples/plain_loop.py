"""A plain PyTorch loop: two adapters with heads of different sizes on one backbone, real images, no trainer, no download.

A tiny convolutional network learns the even digits of scikit-learn's `load_digits`. Then it is frozen, and two adapters learn, one
after the other, all ten digits, and whether a digit is above four.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import graftwork as gw


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, lr: float) -> None:
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows]) + gw.auxiliary_loss(model)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return (model(x).argmax(-1) == y).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    split = train_test_split(images, digits, test_size=0.3, random_state=0)
    x, x_test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in split[:2])
    y, y_test = (torch.tensor(part) for part in split[2:])

    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 5),
    )  # fmt: skip
    even = y % 2 == 0
    # gw.adapters and gw.auxiliary_loss need a graft, so the backbone's own training is a loop of its own
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[even]), y[even] // 2).backward()
        optimiser.step()

    tasks = {"digits": (10, y, y_test), "above four": (2, (y > 4).long(), (y_test > 4).long())}
    for name, (classes, target, target_test) in tasks.items():
        methods = [gw.LoRA(r=4, at="conv, linear"), gw.Full(at="head", outputs=classes)]
        adapter = gw.graft(model, methods, name=name)
        print(adapter)
        print(f"  before {accuracy(model, x_test, target_test):.3f}", end="")
        train(model, x, target, epochs=12, lr=3e-3)
        print(f"  after {accuracy(model, x_test, target_test):.3f}")

    for name, (_, _, target_test) in tasks.items():
        gw.activate(model, name)
        print(f"{name}: {accuracy(model, x_test, target_test):.3f} again after switching")
    print(gw.summary(model))


if __name__ == "__main__":
    main()
