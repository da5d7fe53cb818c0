"""What the rows of the suite share: grafting a case, leaving the initial values, training, comparing with the past."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftwork as gw

from .hosts import forward, fresh
from .settings import CASES, Case

every = pytest.mark.parametrize("case", CASES, ids=str)
# hosts that differ from another one in nothing that number formats, copies and files could notice
ALIKE = {"linear_square", "linear_read", "conv1d", "conv2d_reflect", "packed_qkv", "multihead_whole", "encoder", "gpt2"}


def where(accept: Callable[[Case], bool], *further: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """The cases that `accept` takes. further: marks of those of a method's further settings, and on hosts like others."""
    chosen = [case for case in CASES if accept(case)]
    marked = [pytest.param(c, marks=further if c.setting.label or c.host.name in ALIKE else ()) for c in chosen]
    return pytest.mark.parametrize("case", marked, ids=str)


# every case, of which the further ones are run by `make slow`
first = where(lambda case: True, pytest.mark.slow)


def on(*hosts: str) -> pytest.MarkDecorator:
    """The cases on these hosts."""
    return where(lambda case: case.host.name in hosts)


def dear(*hosts: str) -> pytest.MarkDecorator:
    """The cases on these hosts, of a test that takes seconds: of each method one, on the first of the hosts that it is tried on, is
    among the quick tests; the others are run by `make slow`."""
    chosen = sorted((case for case in CASES if case.host.name in hosts), key=lambda case: hosts.index(case.host.name))
    first: dict[str, Case] = {}
    for case in chosen:
        first.setdefault(case.name, case)
    quick = {str(case) for case in first.values()}
    marked = [pytest.param(case, marks=() if str(case) in quick else pytest.mark.slow) for case in chosen]
    return pytest.mark.parametrize("case", marked, ids=str)


def grafted(case: Case, name: str = "a", noise: bool = True, model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """The case's model with its adapter, by default away from its initial values."""
    model = fresh(case.host) if model is None else model
    adapter = gw.graft(model, case.method, name, head=False, seed=0)
    if noise:
        calibrate(model, case)
        leave_init(adapter)
    return model, adapter


def calibrate(model: nn.Module, case: Case) -> None:
    """For methods that need data before training."""
    if any("calibrate" in m.needs for a in gw.adapters(model).values() for m in a.methods):
        dtype = next(model.parameters()).dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.host.inputs().items()}
        gw.calibrate(model, [inputs], loss)


@torch.no_grad()
def leave_init(adapter: Any, seed: int = 1) -> None:
    """Move every parameter away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.1)


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A loss whose gradient reaches every output."""
    out = forward(model, inputs).float()
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(11))
    return (out - target).pow(2).mean()


def train(model: nn.Module, adapter: Any, inputs: dict[str, Tensor], steps: range, of: int, lr: float = 0.05) -> None:
    """Some steps of plain SGD, as a user's own loop would do them."""
    model.train()
    optimizer = torch.optim.SGD(list(adapter.parameters()), lr=lr)
    for i in steps:
        torch.manual_seed(i)  # what is drawn in training is that of the step
        (loss(model, inputs) + gw.auxiliary_loss(model)).backward()
        optimizer.step()
        gw.step(model, (i + 1) / of)
        optimizer.zero_grad()
    model.eval()


def gradients(adapter: Any) -> dict[str, Tensor]:
    """The gradients by name."""
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def is_base(path: str) -> bool:
    """Whether a path names a part of the backbone, not of an adapter."""
    return "graft" not in path.split(".")


class Snapshot:
    """What a model is made of, to the bit."""

    def __init__(self, model: nn.Module) -> None:
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items() if is_base(k)}
        parameters = [(k, p) for k, p in model.named_parameters(remove_duplicate=False) if is_base(k)]
        self.parameters = {k: id(p) for k, p in parameters}
        self.flags = {k: p.requires_grad for k, p in parameters}
        self.classes = {k: type(m) for k, m in model.named_modules() if is_base(k)}
        self.attributes = {
            k: (
                sorted(m.__dict__),
                sorted(m._modules),
                sorted(m._parameters),
                sorted(m._buffers),
                len(m._forward_hooks),
            )
            for k, m in model.named_modules()
            if is_base(k)
        }
        config = getattr(model, "config", None)
        self.config = copy.deepcopy(config.to_dict()) if hasattr(config, "to_dict") else None
        self.adapters = sorted(gw.adapters(model))
        self.active = gw.active(model)

    def same_weights(self, model: nn.Module) -> None:
        """The backbone's tensors are the same bits, under the same names."""
        self.same_bits(model)
        assert Snapshot(model).parameters == self.parameters

    def same_bits(self, model: nn.Module) -> None:
        """The backbone's values are the same, whatever tensors hold them."""
        now = Snapshot(model)
        assert now.state.keys() == self.state.keys()
        changed = [k for k, v in self.state.items() if not torch.equal(v, now.state[k])]
        assert not changed, changed

    def same(self, model: nn.Module) -> None:
        """Everything is as it was."""
        self.same_weights(model)
        now = Snapshot(model)
        for what in ("flags", "classes", "attributes", "config", "adapters", "active"):
            assert getattr(now, what) == getattr(self, what), what


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest number."""
    difference = (a.float() - b.float()).abs().max().item()
    assert difference <= tolerance * max(1.0, b.float().abs().max().item()), f"differs by {difference:.3g}"
