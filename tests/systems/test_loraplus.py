"""Hayou et al. 2024: the factor at the output learns faster than the one at the input."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids, llama, spread
from weight_models import counts, mixtral, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("loraplus")


def measured(adapter, lr=1e-4, **given):
    return {(round(g["lr"], 12), len(g["params"])) for g in adapter.groups(lr, **given)}


def test_loraplus__the_published_groups():
    """lr of A, of embeddings, of B; and of the vectors, of which LoRA has none."""
    adapter = gw.graft(llama(), gw.LoRAPlus(at="q, embed"), head=False)
    assert measured(adapter) == {(1e-4, 2), (1e-6, 2), (1.6e-3, 2)}
    dora = gw.graft(llama(), gw.LoRAPlus(of=gw.DoRA(r=4), at="q"), head=False)
    decays = {(round(g["lr"], 12), g["weight_decay"]): len(g["params"]) for g in dora.groups(1e-4, weight_decay=0.1)}
    assert decays == {(1e-4, 0.1): 2, (1.6e-3, 0.1): 2, (1.6e-3, 0.0): 2}


def test_loraplus__ratio_one_is_one_plain_group():
    adapter = gw.graft(llama(), gw.LoRAPlus(of=gw.LoRA(r=4), ratio=1.0), head=False)
    ((group),) = adapter.groups(3e-4)
    assert group["lr"] == 3e-4
    assert set(map(id, group["params"])) == set(map(id, adapter.parameters()))


@pytest.mark.parametrize("method", [gw.LoRA(r=4), gw.LoRA(r=4, bias=True), gw.DoRA(r=4), gw.VeRA(r=4), gw.AdaLoRA(),
                                    *gw.PiSSA(r=4), gw.Poly(r=2), gw.Mixture(of=gw.LoRA(r=2), experts=2)], ids=str)  # fmt: skip
def test_loraplus__every_tensor_is_in_one_group(method):
    adapter = gw.graft(bert(), gw.LoRAPlus(of=method), head=False)
    groups = adapter.groups(1e-4)
    given = [id(p) for g in groups for p in g["params"]]
    assert sorted(given) == sorted(map(id, adapter.parameters()))
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    for name, p in adapter.named_parameters():
        fast = p.dim() == 1 or name.rpartition(".")[2].rpartition("/")[2].startswith("up")
        if not name.endswith("logits"):
            assert rates[id(p)] == pytest.approx(1.6e-3 if fast else 1e-4), name


def test_loraplus__experts_have_factors_not_vectors():
    adapter = gw.graft(mixtral(), gw.LoRAPlus(of=gw.LoRA(r=2), at="expert.gate_up, expert.down"), head=False)
    assert measured(adapter) == {(1e-4, 2), (1.6e-3, 2)}


def test_loraplus__schedules_scale_all_groups_alike():
    adapter = gw.graft(llama(), gw.LoRAPlus(at="q, embed"), head=False)
    optimizer = torch.optim.AdamW(adapter.groups(1e-4))
    start = [g["lr"] for g in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(1, 4):
        optimizer.step()
        schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([lr / (1 + step) for lr in start])


def test_loraplus__b_moves_faster_and_the_file_is_loras(tmp_path):
    model, x = llama(), ids()
    adapter = gw.graft(model, gw.LoRAPlus(of=gw.LoRA(r=4), at="q, o"), "a", head=False)
    spread(adapter)
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.groups(1e-3))
    model(x).logits.square().mean().backward()
    optimizer.step()
    for name, p in adapter.named_parameters():
        rate = 16e-3 if name.endswith("up") else 1e-3
        torch.testing.assert_close(p, before[name] - rate * p.grad)
    gw.save(model, "a", tmp_path)
    again = llama()
    assert gw.load(again, tmp_path).methods == (gw.LoRA(r=4, at="q, o"),)
    assert torch.equal(again(x).logits, model(x).logits)


def test_loraplus__counts():
    assert counts(roberta_of("base"), gw.LoRAPlus(of=gw.LoRA(r=8))) == (294_912, 294_912)
    with pytest.raises(gw.GraftError, match="ratio"):
        gw.LoRAPlus(ratio=0.5)
