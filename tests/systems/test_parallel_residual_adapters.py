"""Rebuffi et al. 2018: parallel residual adapters, and one basis for several domains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from adapter_models import closed_form, on_meta, spread
from conv_models import images, logits, resnet
from torch import nn

import graftwork as gw

pytestmark = pytest.mark.system("parallel-residual-adapters")


def alone(conv: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """A convolution behind another one, with its delta."""
    model = nn.Sequential(nn.Conv2d(3, conv.in_channels, 1), conv)
    gw.graft(model, gw.ParallelConv(at="/^1$/", **options), head=False, seed=0)
    (delta,) = gw.adapters(model)["default"].deltas()
    return model.eval(), delta


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("r", [None, 3])
def test_parallel_residual_adapters__merged_equals_the_two_branches(stride, size, groups, r):
    torch.manual_seed(0)
    model, delta = alone(nn.Conv2d(6, 10, 3, stride, 1, groups=groups), r=r)
    x = torch.randn(2, 3, *size)
    with gw.using(model, None):
        h, plain = model[0](x), model(x)
    expected = plain + F.conv2d(h, delta.matrix()[..., None, None], stride=stride, groups=groups)
    torch.testing.assert_close(model(x), expected)
    gw.merge(model)
    gw.forget(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (2, 2), (1, 2)])
def test_parallel_residual_adapters__any_padding_with_a_centre(padding, dilation):
    """In training with dropout the branch is computed; at a rate that drops nothing it is the merged kernel."""
    torch.manual_seed(0)
    model, delta = alone(nn.Conv2d(6, 10, 3, 2, padding, dilation), dropout=0.5)
    x = torch.randn(2, 3, 9, 8)
    merged = model(x)
    delta.dropout = 1e-12
    torch.testing.assert_close(model.train()(x), merged)


def test_parallel_residual_adapters__dropout_takes_whole_channels_of_the_branch():
    torch.manual_seed(0)
    model, delta = alone(nn.Conv2d(6, 10, 3, padding=1), dropout=0.5)
    x = torch.randn(1, 3, 5, 5)
    with gw.using(model, None):
        h, plain = model[0](x), model(x)
    out = model.train()(x) - plain
    parts = [F.conv2d(2 * h[:, c : c + 1], delta.down[:, c : c + 1, None, None]) for c in range(6)]
    fits = [
        bits
        for bits in range(64)
        if torch.allclose(sum((p for c, p in enumerate(parts) if bits >> c & 1), torch.zeros(())), out, atol=1e-5)
    ]
    assert len(fits) == 1 and fits[0] not in (0, 63)
    with pytest.raises(gw.GraftError, match=r"model\.eval"):
        gw.merge(model)


def test_parallel_residual_adapters__low_rank_is_lora_with_one_tap():
    torch.manual_seed(0)
    model, delta = alone(nn.Conv2d(6, 10, 3, 2, 1), r=3)
    spread(gw.adapters(model)["default"])
    x = torch.randn(2, 3, 9, 8)
    low = model(x)
    lora = gw.graft(model, gw.LoRA(r=3, alpha=3, at="/^1$/"), "lora", head=False)
    (other,) = lora.deltas()
    down = torch.zeros(3, 6, 9)
    down[..., 4] = delta.down.detach()
    other.down.data, other.up.data = down.flatten(1), delta.up.detach().clone()
    torch.testing.assert_close(model(x), low)
    with gw.using(model, None):
        h, plain = model[0](x), model(x)
    thin = F.conv2d(h, delta.down[..., None, None], stride=2)
    torch.testing.assert_close(low, plain + F.conv2d(thin, delta.up[..., None, None]))


def domains(names: str) -> nn.Module:
    model = resnet("basic")
    for seed, name in enumerate(names):
        adapter = gw.graft(model, gw.ParallelResidualAdapters(), name, seed=seed)
        spread(adapter, 0.05 * (seed + 1))
    return model


def test_parallel_residual_adapters__one_basis_of_full_rank_loses_nothing():
    model, x = domains("ab"), images()
    gw.activate(model, "a")
    a = logits(model, x)
    at_conv = [site.key for site in gw.adapters(model)["a"].parts[0].sites]
    small = min(d.down.shape[0] for d in gw.adapters(model)["a"].parts[0].deltas.values())
    made = gw.share_basis(model, {"a": "a2", "b": "b2"}, small)
    assert gw.active(model) == "b2" and list(made) == ["a2", "b2"]
    for key in at_conv:
        one, two = (made[n].parts[0].deltas[key] for n in ("a2", "b2"))
        assert one.up is two.up and one.up.shape[1] == small
        old = torch.cat([gw.adapters(model)[n].parts[0].deltas[key].matrix() for n in "ab"], 1).detach()
        left = torch.linalg.svdvals(old)[small:]
        lost = torch.cat([one.matrix(), two.matrix()], 1) - old
        torch.testing.assert_close(lost.norm(), left.norm(), atol=1e-5, rtol=1e-4)
        if old.shape[0] == small:
            torch.testing.assert_close(lost, torch.zeros_like(lost), atol=1e-5, rtol=0)
    gw.activate(model, "a")
    assert torch.equal(logits(model, x), a)


def test_parallel_residual_adapters__a_shared_basis_is_counted_once_and_trains_on(tmp_path):
    torch.manual_seed(0)
    k, names = 4, {name: f"{name}2" for name in "abc"}
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 10, 3, padding=1))
    for name in names:
        gw.graft(model, gw.ParallelConv(at="/^1$/"), name)
    made = gw.share_basis(model, names, k)
    held = {
        id(t): t.numel()
        for adapter in made.values()
        for delta in adapter.deltas()
        for t in (*delta.parameters(), *delta.buffers())
    }
    assert sum(held.values()) == k * (10 + 3 * 6)
    x, basis = torch.randn(2, 3, 5, 5), next(made["a2"].deltas()).up.clone()
    gw.activate(model, "a2")
    assert made["a2"].num_parameters == closed_form(model, made["a2"].methods) == k * 6
    other = next(made["b2"].deltas()).matrix().clone()
    model(x).square().mean().backward()
    torch.optim.SGD(list(made["a2"].parameters()), lr=0.1).step()
    assert torch.equal(next(made["b2"].deltas()).matrix(), other)
    assert torch.equal(next(made["a2"].deltas()).up, basis)
    gw.save(model, "a2", tmp_path)
    out = model(x)
    gw.remove(model, "a2")
    gw.load(model, tmp_path, "again")
    assert torch.equal(model(x), out)


def test_parallel_residual_adapters__with_a_zero_the_statistics_are_the_source_s():
    model, x = resnet(), images()
    base = logits(model, x)
    adapter = gw.graft(model, gw.ParallelResidualAdapters(init="zero"), head=False)
    assert torch.equal(logits(model, x), base)
    norms = [d.norm for d in adapter.parts[1].deltas.values()]
    hosts = [site.module for site in adapter.parts[1].sites]
    assert all(torch.equal(n.mean, h.running_mean) and n.mean.any() for n, h in zip(norms, hosts, strict=True))
    assert all(n.var is not h.running_var for n, h in zip(norms, hosts, strict=True))


def test_parallel_residual_adapters__rows_and_sums():
    model, x = domains("ab"), images(3)
    for d in [d for a in gw.adapters(model).values() for d in a.parts[1].deltas.values()]:
        d.norm.var.uniform_(0.5, 1.5)
    each = {}
    for name in "ab":
        gw.activate(model, name)
        each[name] = logits(model, x)
    gw.activate(model, gw.rows(["a", "b", None]))
    mixed = logits(model, x)
    gw.activate(model, None)
    expected = torch.stack([each["a"][0], each["b"][1], logits(model, x)[2]])
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)
    gw.activate(model, "0.5*a + 0.5*b")
    summed = logits(model, x)
    gw.merge(model)
    torch.testing.assert_close(logits(model, x), summed, atol=1e-5, rtol=1e-4)


def test_parallel_residual_adapters__counts():
    config = T.ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128, 256], depths=[4, 4, 4], layer_type="basic", num_labels=10
    )
    model = on_meta(lambda: T.ResNetForImageClassification(config))
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    filters = sum(m.weight.numel() for m in spatial)
    assert closed_form(model, [gw.ParallelConv()]) * 9 == filters  # a ninth of the 3 x 3
    sizes = [(m.in_channels, m.out_channels) for m in spatial]
    assert closed_form(model, [gw.ParallelConv(r=8)]) == sum(8 * (i + o) for i, o in sizes)
    adapter = gw.graft(model, gw.ParallelResidualAdapters(), head=False)
    others = sum(2 * s.d for s in adapter.parts[1].sites) - sum(2 * o for _, o in sizes)
    assert adapter.num_parameters == sum(i * o + 2 * o for i, o in sizes) + others


@pytest.mark.parametrize(
    ("conv", "options", "words"),
    [
        (nn.Conv2d(6, 10, 2), {}, "no centre"),
        (nn.Conv2d(6, 10, (3, 2), dilation=2), {}, "no centre"),
        (nn.Conv2d(6, 10, 3, padding=3), {"fixed": True}, "no rank"),
        (nn.ConvTranspose2d(6, 10, 3), {}, "not a convolution"),
    ],
)
def test_parallel_residual_adapters__what_cannot_be_is_refused_by_name(conv, options, words):
    with pytest.raises(gw.GraftError, match=words):
        alone(conv, **options)


def test_parallel_residual_adapters__bases_that_cannot_be_shared():
    model = domains("ab")
    gw.graft(model, gw.LoRA(at="conv"), "lora", head=False)
    before = sorted(gw.adapters(model))
    for names, k, words in (
        ({"a": "new", "lora": "other"}, 4, "same sites"),
        ({"a": "new", "b": "new"}, 4, "each new name once"),
        ({"a": "new", "b": "b"}, 4, "has one"),
        ({"a": "new"}, 999, "choose k"),
    ):
        with pytest.raises(gw.GraftError, match=words):
            gw.share_basis(model, names, k)
    assert sorted(gw.adapters(model)) == before
