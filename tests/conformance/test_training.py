"""Training: who gets gradients, what stays as it was, and the ways a model is trained."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import graftwork as gw

from .cases import Snapshot, calibrate, close, every, first, gradients, grafted, is_base, loss, on, train
from .hosts import fresh, output
from .settings import CASES, Case

DRAWS = 30  # training passes after which everything that is drawn has been


@every
def test_gradients_go_to_the_adapter_and_to_all_of_it(case: Case):
    model, adapter = grafted(case)
    model.train()
    parameters = dict(adapter.named_parameters())
    idle = [name for name in parameters if not any(part in name for part in case.setting.thin)]
    for _ in range(DRAWS):  # one pass is enough, unless what takes part in it is drawn
        (loss(model, case.host.inputs()) + gw.auxiliary_loss(model)).backward()
        idle = [name for name in idle if (grad := parameters[name].grad) is None or not grad.any()]
        if not idle:
            break
    assert not idle, f"never trained: {idle}"
    own = {id(p) for p in adapter.parameters()}
    for name, p in model.named_parameters():
        assert p.requires_grad == (id(p) in own), name
        assert id(p) in own or p.grad is None, name
    assert all(torch.isfinite(p.grad).all() for p in parameters.values() if p.grad is not None)


@every
def test_the_backbone_is_untouched(case: Case):
    inputs = case.host.inputs()
    model = fresh(case.host)
    before = Snapshot(model)
    base = output(model, inputs)
    _, adapter = grafted(case, noise=False, model=model)
    calibrate(model, case)
    before.same_weights(model)
    assert not any(p.requires_grad for name, p in model.named_parameters() if is_base(name))
    start = {k: v.clone() for k, v in adapter.state_dict().items()}
    train(model, adapter, inputs, range(3), 3)
    before.same_weights(model)
    assert any(not torch.equal(v, start[k]) for k, v in adapter.state_dict().items())
    gw.activate(model, None)
    before.same_weights(model)
    assert Snapshot(model).classes == before.classes
    assert torch.equal(output(model, inputs), base)
    gw.activate(model, "a")
    before.same_weights(model)
    gw.remove(model, "a")
    before.same(model)
    assert torch.equal(output(model, inputs), base)


@first
def test_training_lowers_the_loss(case: Case):
    inputs = case.host.inputs()
    model, adapter = grafted(case, noise=False)
    calibrate(model, case)
    before = loss(model, inputs).item()
    train(model, adapter, inputs, range(12), 12, lr=case.setting.lr)
    assert loss(model, inputs).item() < before


@first
def test_checkpointing_gives_the_same_gradients(case: Case):
    inputs = case.host.inputs()
    model, adapter = grafted(case)
    model.train()
    torch.manual_seed(1)  # the same draws in both passes
    loss(model, inputs).backward()
    plain = gradients(adapter)
    for p in adapter.parameters():
        p.grad = None
    torch.manual_seed(1)
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss(model, inputs).backward()
    else:
        checkpoint(loss, model, inputs, use_reentrant=False).backward()
    again = gradients(adapter)
    assert again.keys() == plain.keys()
    for name, grad in plain.items():
        close(again[name], grad, 1e-5)


@first
def test_bfloat16(case: Case):
    """A backbone in bfloat16 gets an adapter in bfloat16, which trains."""
    inputs = case.host.inputs()
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    model, adapter = grafted(case, model=fresh(case.host).bfloat16())
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    out = output(model, half)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
    train(model, adapter, half, range(1), 1)
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


@first
def test_autocast(case: Case):
    inputs = case.host.inputs()
    model, adapter = grafted(case)
    exact = output(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        close(output(model, inputs), exact, 0.1)
        model.train()
        value = loss(model, inputs)
    value.backward()
    for name, p in adapter.named_parameters():
        assert p.dtype == torch.float32
        assert p.grad is None or (p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()), name


@pytest.mark.parametrize("case", [c for c in CASES if "step" in c.method.needs and c.host.name == "bert"], ids=str)
def test_a_method_that_must_be_stepped_says_so(case: Case):
    model, adapter = grafted(case, noise=False)
    model.train()
    optimizer = torch.optim.SGD(list(adapter.parameters()), lr=0.1)
    with pytest.warns(UserWarning, match=r"gw\.step"):
        for _ in range(4):
            loss(model, case.host.inputs()).backward()
            optimizer.step()
            optimizer.zero_grad()


@on("bert")
def test_a_method_that_is_stepped_is_quiet(case: Case):
    model, adapter = grafted(case, noise=False)
    calibrate(model, case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, adapter, case.host.inputs(), range(4), 4)
