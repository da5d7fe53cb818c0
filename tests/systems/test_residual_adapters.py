"""Rebuffi et al. 2017: residual adapters in series, and the Visual Decathlon's score."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from adapter_models import closed_form, on_meta
from conv_models import images, logits, resnet, varied
from torch import nn
from torch.utils.checkpoint import checkpoint

import graftwork as gw
from graftwork.core.adapter import Adapter
from graftwork.core.method import Method
from graftwork.train.metrics import decathlon

pytestmark = pytest.mark.system("residual-adapters")


class Cell(nn.Module):
    """A convolution and its norm, with a bias or without."""

    def __init__(self, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3, stride, 1, bias=bias)
        self.norm = nn.BatchNorm2d(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


def trained(model: nn.Module, methods: Sequence[Method], name: str, seed: int = 0, head: bool = False) -> Adapter:
    """An adapter after three steps on noise of its own domain."""
    adapter = gw.graft(model, list(methods), name, head=head, seed=seed)
    optimizer = torch.optim.SGD(list(adapter.parameters()), lr=0.05)
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    model.train()
    for step in range(3):
        x = torch.randn(4, channels, 16, 16, generator=torch.Generator().manual_seed(10 * seed + step)) + seed
        out = model(x)
        (out if isinstance(out, torch.Tensor) else out.logits).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return adapter


@pytest.mark.parametrize("skip", ["y", "u"])
@pytest.mark.parametrize("bias", [True, False])
def test_residual_adapters__folds_into_the_convolution(skip, bias):
    torch.manual_seed(0)
    model, x = varied(Cell(bias=bias)), torch.randn(2, 6, 7, 8)
    adapter = trained(model, gw.ResidualAdapters(skip=skip), "d")
    series, own = adapter.deltas()
    y = F.conv2d(x, model.conv._parameters["weight"], model.conv._parameters["bias"], padding=1)
    a = series.norm
    u = F.batch_norm(y, a.mean, a.var, a.weight, a.bias)
    v = F.conv2d(u, series.mix[..., None, None]) + (y if skip == "y" else u)
    b = own.norm
    expected = F.batch_norm(v, b.mean, b.var, b.weight, b.bias)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    model.train()
    before = model.conv._parameters["weight"].clone()
    with pytest.raises(gw.GraftError, match=r"model\.eval"):
        gw.merge(model)
    assert torch.equal(model.conv._parameters["weight"], before)
    gw.merge(model.eval())
    gw.forget(model)
    assert type(model.conv) is nn.Conv2d and model.conv.bias is not None
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_residual_adapters__training_normalises_by_the_batch():
    torch.manual_seed(0)
    model, x = varied(Cell()), torch.randn(4, 6, 7, 8)
    adapter = gw.graft(model, gw.ResidualAdapters(), head=False, seed=0)
    series, own = adapter.deltas()
    means = series.norm.mean.clone(), own.norm.mean.clone()
    y = F.conv2d(x, model.conv._parameters["weight"], padding=1)
    twins = nn.BatchNorm2d(10), copy.deepcopy(model.norm)
    for twin, norm in zip(twins, (series.norm, own.norm), strict=True):
        twin.weight, twin.bias = nn.Parameter(norm.weight.clone()), nn.Parameter(norm.bias.clone())
    second = nn.BatchNorm2d(10)
    second.load_state_dict({k: v for k, v in model.norm.state_dict().items() if "graft" not in k})
    v = y + F.conv2d(twins[0].train()(y), series.mix[..., None, None])
    expected = second.train()(v)
    model.train()
    torch.testing.assert_close(model(x), expected)
    for norm, twin, before in zip((series.norm, own.norm), (twins[0], second), means, strict=True):
        assert not torch.equal(norm.mean, before)
        torch.testing.assert_close(norm.mean, twin.running_mean)
        torch.testing.assert_close(norm.var, twin.running_var)


def test_residual_adapters__zero_is_the_backbone_and_filters_are_shared():
    model, x = resnet("basic"), images()
    base = logits(model, x)
    filters = {n: id(p) for n, p in model.named_parameters() if p.dim() == 4}
    gw.graft(model, gw.ResidualAdapters(init="zero"), "one", head=False)
    assert torch.equal(logits(model, x), base)
    trained(model, gw.ResidualAdapters(), "two", seed=1)
    assert not torch.allclose(logits(model, x), base, atol=1e-3)
    assert {n: id(p) for n, p in model.named_parameters() if p.dim() == 4 and "graft" not in n} == filters
    gw.activate(model, None)
    assert torch.equal(logits(model, x), base)


def test_residual_adapters__statistics_belong_to_a_domain():
    model, x = resnet("basic"), images()
    backbone = {n: t.clone() for n, t in model.named_buffers()}
    trained(model, gw.ResidualAdapters(), "one", seed=1, head=True)
    one = logits(model, x)
    trained(model, gw.ResidualAdapters(), "two", seed=2, head=True)
    two = logits(model, x)
    assert not torch.allclose(one, two, atol=1e-3)
    gw.activate(model, "one")
    assert torch.equal(logits(model, x), one)
    assert all(torch.equal(model.get_buffer(n), t) for n, t in backbone.items())
    gw.activate(model, gw.rows(["two", "one"]))
    torch.testing.assert_close(logits(model, x), torch.stack([two[0], one[1]]), atol=1e-5, rtol=1e-4)
    with pytest.raises(gw.GraftError, match="batch"):
        model.train()(x)


def test_residual_adapters__what_is_made_of_old_statistics_is_made_again():
    """Statistics alone may move: a pass in training without a step."""
    model, x = resnet("basic"), images()
    for seed, name in enumerate(("one", "two")):
        trained(model, gw.ResidualAdapters(), name, seed=seed)
    both = gw.rows(["one", "two"])
    gw.activate(model, both)
    before = logits(model, x)
    gw.activate(model, "two")
    alone = logits(model, x)
    logits(model.train(), x + 3)
    model.eval()
    after = logits(model, x)
    assert not torch.allclose(after, alone, atol=1e-4)
    gw.activate(model, both)
    mixed = logits(model, x)
    torch.testing.assert_close(mixed, torch.stack([before[0], after[1]]), atol=1e-5, rtol=1e-4)


def test_residual_adapters__a_file_keeps_the_statistics(tmp_path):
    model, x = resnet("basic"), images()
    trained(model, gw.ResidualAdapters(), "d", seed=1)
    gw.save(model, "d", tmp_path)
    twin = resnet("basic")
    gw.load(twin, tmp_path, "e")
    assert torch.equal(logits(twin, x), logits(model, x))


def test_residual_adapters__a_block_that_is_run_again_is_counted_once():
    """Under gradient checkpointing."""

    class Twice(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.again = varied(Cell()), again

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.cell, x, use_reentrant=False) if self.again else self.cell(x)

    seen = []
    for again in (False, True):
        model = Twice(again)
        adapter = gw.graft(model, gw.ResidualAdapters(), head=False, seed=0)
        model.train()(torch.randn(4, 6, 7, 8, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        seen.append([d.norm.mean.clone() for d in adapter.deltas()] + [p.grad for p in adapter.parameters()])
    for one, two in zip(*seen, strict=True):
        torch.testing.assert_close(one, two)


def test_residual_adapters__counts():
    config = T.ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128, 256], depths=[4, 4, 4], layer_type="basic", num_labels=10
    )
    model = on_meta(lambda: T.ResNetForImageClassification(config))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    spatial = [m for m in convs if m.kernel_size == (3, 3)]
    others = sum(2 * m.out_channels for m in convs if m.kernel_size != (3, 3))  # norms of the stem and the shortcuts
    methods = gw.ResidualAdapters()
    assert len(spatial) == 24
    assert closed_form(model, methods) == sum(m.out_channels**2 + 4 * m.out_channels for m in spatial) + others
    shared = sum(p.numel() for p in model.parameters())
    assert 0.10 < gw.graft(model, methods, head=False).num_parameters / shared < 0.13


def test_residual_adapters__decathlon_score():
    fine = [0.2 + 0.05 * d for d in range(10)]
    assert decathlon(fine, fine) == pytest.approx(2500)
    assert decathlon([0.0] * 10, fine) == pytest.approx(10_000)
    assert decathlon([2 * e + 0.1 for e in fine], fine) == 0
    assert decathlon([e if d else 0.0 for d, e in enumerate(fine)], fine) == pytest.approx(9 * 250 + 1000)
    with pytest.raises(gw.GraftError, match="above 0"):
        decathlon([0.1], [0.0])


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (gw.SeriesConv(at="norm"), "not a convolution"),
        (gw.BatchNorm(at="conv"), "no batch norm"),
        (gw.BatchNorm(at="/2/"), "no batch norm"),
        (gw.BatchNorm(at="/3/"), "without gains"),
    ],
)
def test_residual_adapters__what_cannot_be_is_refused_by_name(method, words):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    model[3] = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(gw.GraftError, match=words):
        gw.graft(model, method, head=False)
    assert not any("graft" in name for name, _ in model.named_modules())
