"""Zhang et al. 2023: an adapter is trained as disjoint sparse copies of itself, and stored as their mean."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapter_models import closed_form, images, spread, vit, vit_base
from torch import nn
from weight_models import around

import graftwork as gw
from graftwork.objectives.mosa import divergence, mosa_loss

pytestmark = pytest.mark.system("mosa")
LABELS = torch.tensor([0, 1])


def train(model, adapter, steps: int = 8, weight_decay: float = 0.1, two: bool = True) -> None:
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02, weight_decay=weight_decay)
    for i in range(steps):
        torch.manual_seed(i)
        first = model(images()).logits
        loss = mosa_loss(first, model(images()).logits, LABELS) if two else F.cross_entropy(first, LABELS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits(model):
    with torch.no_grad():
        return model(images()).logits


@pytest.mark.parametrize("copies", [2, 4, 7])
@pytest.mark.parametrize("share", ["down", "none"])
def test_mosa__masks_are_disjoint_and_nothing_else_ever_moves(copies, share):
    model = vit()
    adapter = gw.graft(model, gw.MoSA(d=5, copies=copies, share=share), head=False)
    start = [copy.deepcopy(d.start.state_dict()) for d in adapter.deltas()]
    train(model, adapter)
    for delta, before in zip(adapter.deltas(), start, strict=True):
        assert set(delta.layers) == ({"up"} if share == "down" else {"up", "down"})
        assert bool(before["up"].any()) is False and ("down" not in before or bool(before["down"].any()))
        for name in delta.layers:
            owner = delta.owner.get_buffer(name)
            sizes = owner.flatten().long().bincount(minlength=copies)
            assert len(sizes) == copies and sizes.max() - sizes.min() <= 1 and sizes.sum() == owner.numel()
            for i in range(copies):
                moved = delta.copy(name, i)[name] - before[name]
                assert not moved[owner != i].any()
                assert torch.equal(delta.copy(name, i)[name][owner != i], before[name][owner != i])
        assert any((delta.copy("up", i)["up"] != before["up"]).any() for i in range(copies))


def test_mosa__masks_are_random_and_from_the_seed():
    owners = []
    for seed in (0, 0, 1):
        adapter = gw.graft(vit(), gw.MoSA(d=5), head=False, seed=seed)
        owners.append([d.owner.get_buffer("up") for d in adapter.deltas()])
    assert all(torch.equal(a, b) for a, b in zip(owners[0], owners[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(owners[0], owners[2], strict=True))
    assert not torch.equal(*owners[0])


@pytest.mark.parametrize("share", ["down", "none"])
def test_mosa__one_copy_is_the_host_adapter_to_the_bit(share):
    host = gw.Bottleneck(
        d=5, act="gelu", position="residual", norm="before", scale=0.1, dropout=0.1, init="lora", at="mlp"
    )
    trained = []
    for method in (host, gw.MoSA(d=5, copies=1, share=share)):
        model = vit()
        adapter = gw.graft(model, method, head=False, seed=3)
        train(model, adapter, two=False)
        trained.append((logits(model), adapter))
    assert torch.equal(trained[0][0], trained[1][0])
    for one, other in zip(trained[0][1].deltas(), trained[1][1].deltas(), strict=True):
        assert torch.equal(one.up, other.merged()["up"]) and torch.equal(one.up_bias, other.merged()["up_bias"])
        assert one.up.any() and torch.equal(one.norm_weight, other.delta.norm_weight)


def test_mosa__the_merge_is_the_mean_of_the_copies():
    model = vit(layers=1)
    adapter = gw.graft(model, gw.MoSA(d=5, share="none"), head=False)
    train(model, adapter)
    (delta,) = adapter.deltas()
    h = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    each = [F.linear(h, *delta.copy("up", i).values()) for i in range(4)]
    assert all(not torch.allclose(each[0], other) for other in each[1:])
    torch.testing.assert_close(F.linear(h, delta.merged()["up"], delta.merged()["up_bias"]), sum(each) / 4)
    down = sum(delta.copy("down", i)["down"] for i in range(4)) / 4
    torch.testing.assert_close(delta.merged()["down"], down)
    delta.joint = True
    start = delta.start.get_buffer("down")
    torch.testing.assert_close(
        delta.merged()["down"], start + sum(delta.copy("down", i)["down"] - start for i in range(4))
    )


@pytest.mark.parametrize("merge", ["add", "joint"])
def test_mosa__evaluation_is_deterministic_and_the_file_is_the_hosts(merge, tmp_path):
    model = vit()
    adapter = gw.graft(model, gw.MoSA(d=5, merge=merge), head=False)
    train(model, adapter)
    out = logits(model)
    assert torch.equal(logits(model), out)
    model.train()
    torch.manual_seed(0)
    seen = {tuple(model(images()).logits.flatten().tolist()) for _ in range(8)}
    assert len(seen) > 1
    gw.save(model.eval(), "default", tmp_path)
    twin = vit()
    loaded = gw.load(twin, tmp_path)
    (method,) = loaded.methods
    assert isinstance(method, gw.Bottleneck) and loaded.num_parameters == 2 * (2 * 32 * 5 + 5 + 32 + 64)
    assert torch.equal(logits(twin), out)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * loaded.num_parameters + 4000


@pytest.mark.parametrize("text, stored", [
    ("split_merge(of=gated(of=bottleneck(d=4)))", "gated"),
    ("keyed(of=split_merge(of=bottleneck(d=4)))", "keyed"),
    ("split_merge(of=lora(r=4), share='none', merge='joint')", "lora"),
])  # fmt: skip
def test_mosa__other_hosts_are_stored_as_themselves_too(text, stored, tmp_path):
    model = vit()
    spread(gw.graft(model, text, head=False))
    out = logits(model)
    gw.save(model, "default", tmp_path)
    twin = vit()
    (method,) = gw.load(twin, tmp_path).methods
    assert method.name == stored and "split_merge" not in str(method)
    assert torch.equal(logits(twin), out)


def test_mosa__only_the_drawn_copy_learns_in_a_pass():
    model = vit(layers=1)
    adapter = gw.graft(model, gw.MoSA(d=5, share="none"), head=False)
    train(model, adapter)
    (delta,) = adapter.deltas()
    drawn = set()
    for i in range(40):
        torch.manual_seed(i)
        model.train()(images()).logits.square().sum().backward()
        (up,) = [i for i, p in enumerate(delta.values["up"]) if p.grad is not None]
        (down,) = [i for i, p in enumerate(delta.values["down"]) if p.grad is not None]
        assert delta.values["up_bias"][up].grad is not None
        drawn.add((up, down))
        for p in adapter.parameters():
            p.grad = None
    assert {up for up, _ in drawn} == {down for _, down in drawn} == {0, 1, 2, 3} and len(drawn) > 8  # each by itself


def test_mosa__a_compiled_pass_draws_too():
    model = around(nn.Linear(8, 12))
    adapter = gw.graft(model, gw.SplitMerge(of=gw.LoRA(r=4, at="/site/"), copies=3), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base, down = F.linear(x, model.site.weight, model.site.bias), delta.delta.down
        expected = [base + delta.delta.scale * x @ down.T @ delta.copy("up", i)["up"].T for i in range(3)]
    torch.compiler.reset()
    compiled, seen = torch.compile(model.train(), fullgraph=True, backend="eager"), []
    torch.manual_seed(0)
    for _ in range(12):
        out = compiled(x)
        seen.append([i for i, e in enumerate(expected) if torch.allclose(out, e, atol=1e-5)])
    assert all(len(found) == 1 for found in seen) and {found[0] for found in seen} == {0, 1, 2}


def test_mosa__loss_by_hand():
    first = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    second = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = torch.tensor([0, 3, 1])
    p, q = first.softmax(1), second.softmax(1)
    forth, back = (p * (p / q).log()).sum(1).mean(), (q * (q / p).log()).sum(1).mean()
    expected = F.cross_entropy(first, y) + 0.5 * F.cross_entropy(second, y) + 2.0 / 2 * (forth + back)
    torch.testing.assert_close(mosa_loss(first, second, y, reg=2.0, add_weight=0.5), expected)
    torch.testing.assert_close(mosa_loss(first, second, y, reg=0.0), F.cross_entropy(first, y))
    (gradient,) = torch.autograd.grad(mosa_loss(first, second, y) - F.cross_entropy(first, y), first)
    (wanted,) = torch.autograd.grad(0.5 * divergence(first, second.detach()), first)
    torch.testing.assert_close(gradient, wanted)  # each pass moves towards the other, which stands still


def test_mosa__counts_and_other_hosts():
    sizes = 2 * 768 * 64 + 64 + 768 + 2 * 768
    assert closed_form(vit_base(), gw.MoSA()) == 12 * (sizes + 3 * 768)
    assert gw.graft(vit_base(), gw.MoSA(), head=False).num_parameters == 12 * (sizes + 3 * 768)
    model = vit()
    gw.graft(model, gw.SplitMerge(of=gw.LoRA(r=4), share="none"), "mosl", head=False)
    train(model, gw.adapters(model)["mosl"])
    out = logits(model)
    gw.merge(model)  # a LoRA folds into the weight
    torch.testing.assert_close(logits(model), out, atol=1e-5, rtol=1e-5)


def test_mosa__what_cannot_be_split_is_refused():
    for method, reason in (
        (gw.SplitMerge(of=gw.IA3()), "no matrix called up"),
        (gw.MoSA(d=1, copies=40)[0], "fewer entries than copies"),
    ):
        model = vit()
        with pytest.raises(gw.GraftError, match=reason):
            gw.graft(model, method, head=False)
        assert gw.adapters(model) == {}
    with pytest.raises(gw.GraftError, match="of its own"):
        gw.SplitMerge(of=gw.AdaLoRA())
