"""Chen et al. 2022: Conv-Adapter, the acceptance checks of the catalogue."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from adapter_models import closed_form, on_meta, spread
from conv_models import convnext, images, logits, resnet
from torch import nn

import graftwork as gw

pytestmark = pytest.mark.system("conv-adapter")
MIDDLE = r"/layer\.1\.convolution/"  # of a bottleneck block of ResNet


def grafted(conv: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """A convolution alone, behind another one, with its delta."""
    model = nn.Sequential(nn.Conv2d(3, conv.in_channels, 1), conv)
    gw.graft(model, gw.ConvAdapter(at="/^1$/", **options), head=False, seed=0)
    (delta,) = gw.adapters(model)["default"].deltas()
    return model, delta


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_conv_adapter__is_the_two_branches_at_every_size(stride, dilation, size, mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, stride, padding=2, dilation=dilation, padding_mode=mode)
    model, delta = grafted(conv)
    x = torch.randn(2, 3, *size)
    out = model(x)
    gw.activate(model, None)
    plain, h = model(x), model[0](x)
    assert out.shape == plain.shape
    down = nn.Conv2d(16, 2, 3, stride, padding=2, dilation=dilation, groups=2, padding_mode=mode)
    up = nn.Conv2d(2, 24, 1)
    down.weight.data, down.bias.data = delta.down.data, delta.down_bias.data
    up.weight.data, up.bias.data = delta.up.data[..., None, None], delta.up_bias.data
    torch.testing.assert_close(out, plain + delta.scale[:, None, None] * up(F.relu(down(h))))


@pytest.mark.parametrize("n", [1, 3])
def test_conv_adapter__in_one_and_in_three_dimensions(n):
    kinds = {1: (nn.Conv1d, 9), 3: (nn.Conv3d, 5)}
    conv, size = kinds[n]
    model = nn.Sequential(conv(3, 16, 1), conv(16, 8, 3, stride=2, padding=1))
    adapter = gw.graft(model, gw.ConvAdapter(at="/^1$/"), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    x = torch.randn(2, 3, *[size] * n)
    h, plain = model[0](x), _bare(model, x)
    one = [None] * n
    inner = conv(16, 2, 3, stride=2, padding=1, groups=2)
    inner.weight.data, inner.bias.data = delta.down.data, delta.down_bias.data
    outer = conv(2, 8, 1)
    outer.weight.data, outer.bias.data = delta.up.data[(..., *one)], delta.up_bias.data
    scale = delta.scale[(..., *one)]
    torch.testing.assert_close(model(x), plain + scale * outer(F.relu(inner(h))), atol=1e-5, rtol=1e-4)


def test_conv_adapter__downsampling_by_a_kernel_of_two():
    model, delta = grafted(nn.Conv2d(16, 32, 2, 2), act="gelu")
    assert delta.down.shape == (2, 8, 2, 2)
    assert model(torch.randn(1, 3, 9, 8)).shape == (1, 32, 4, 4)


def test_conv_adapter__a_channel_is_seen_by_one_bottleneck_channel():
    _, delta = grafted(nn.Conv2d(32, 8, 3, padding=1), reduction=8)
    x = torch.randn(1, 32, 6, 6)
    for c in range(32):
        moved = x.clone()
        moved[:, c] += 1
        change = [
            delta.window.convolve(t, delta.down, delta.down_bias, delta.groups).sum((0, 2, 3)) for t in (x, moved)
        ]
        assert (change[0] != change[1]).nonzero().flatten().tolist() == [c // 8]


def test_conv_adapter__with_one_tap_and_no_non_linearity_is_of_low_rank():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, stride=2, padding=1)
    model, delta = grafted(conv, kernel=1, grouped=False, act="none", reduction=4)
    for bias in (delta.down_bias, delta.up_bias):
        bias.data.zero_()
    x = torch.randn(2, 3, 9, 8)
    out = model(x)
    gw.activate(model, None)
    update = (delta.up @ delta.down.flatten(1))[..., None, None]
    torch.testing.assert_close(out, model(x) + F.conv2d(model[0](x), update, stride=2))
    gw.activate(model, "default")
    delta.scale.data.zero_()
    assert torch.equal(model(x), _bare(model, x))


def _bare(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with gw.using(model, None):
        return model(x)


@pytest.mark.parametrize("make", [resnet, convnext])
def test_conv_adapter__a_scale_of_zero_is_the_backbone(make):
    model, x = make(), images()
    plain = logits(model, x)
    adapter = gw.graft(model, gw.ConvAdapter(act="gelu"), head=False)
    spread(adapter)
    assert not torch.allclose(logits(model, x), plain, atol=1e-3)
    for delta in adapter.deltas():
        delta.scale.data.zero_()
    assert torch.equal(logits(model, x), plain)
    assert torch.equal(logits(_with(make(), init="zero_up"), x), plain)


def _with(model: nn.Module, **options) -> nn.Module:
    gw.graft(model, gw.ConvAdapter(**options), head=False)
    return model


def test_conv_adapter__count_on_resnet_50():
    model = on_meta(lambda: T.ResNetForImageClassification(T.ResNetConfig()))
    method = gw.ConvAdapter(at=MIDDLE)
    assert closed_form(model, [method]) == 199_192
    assert gw.graft(model, method, head=False).num_parameters == 199_192
    # 1 x 1 convolutions have no neighbours: of all convolutions of the blocks the same ones are adapted
    twin = on_meta(lambda: T.ResNetForImageClassification(T.ResNetConfig()))
    adapter = gw.graft(twin, gw.ConvAdapter(), head=False)
    assert adapter.num_parameters == 199_192 and len(adapter.sites) == 16


def test_conv_adapter__convnext_with_its_downsampling():
    model, x = convnext(), images()
    adapter = gw.graft(model, gw.ConvAdapter(at="conv, /downsampling_layer.1/", act="gelu"), head=False)
    assert [tuple(d.down.shape[2:]) for d in adapter.deltas()] == [(7, 7)] * 4 + [(2, 2)]
    assert adapter.num_parameters == sum(m.count(s) for m in adapter.methods for s in adapter.sites)
    loss = model.train()(x).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("position", ["parallel", "sequential"])
@pytest.mark.parametrize("at", ["conv", "block"])
def test_conv_adapter__every_placement_runs_in_rows_and_adds_up(position, at):
    model, x = resnet("basic"), images(3)
    spread(gw.graft(model, gw.ConvAdapter(position=position, at=at), "a", head=False), 0.1)
    alone = logits(model, x)
    gw.graft(model, gw.ConvAdapter(position=position, at=at), "b", head=False, seed=5)
    other = logits(model, x)
    gw.activate(model, gw.rows(["a", None, "b"]))
    mixed = logits(model, x)
    torch.testing.assert_close(mixed[0], alone[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[2], other[2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], _bare(model, x).logits[1], atol=1e-5, rtol=1e-4)
    gw.activate(model, "a - a")
    torch.testing.assert_close(logits(model, x), _bare(model, x).logits, atol=1e-5, rtol=1e-4)
    gw.activate(model, "a")
    with pytest.raises(gw.GraftError, match="merge"):
        gw.merge(model)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (resnet, {"at": "norm"}, "not a convolution"),
        (resnet, {"reduction": 3, "at": MIDDLE}, "groups"),
        (resnet, {"kernel": 2, "at": MIDDLE}, "centres"),
        (resnet, {"kernel": 7, "at": "/shortcut.convolution/", "position": "wherever"}, "one of"),
        (convnext, {"at": "block"}, "which axis"),
        (convnext, {"at": "/downsampling_layer.1$/", "position": "sequential"}, "even kernel"),
    ],
)
def test_conv_adapter__what_cannot_be_is_refused_by_name(model, options, words):
    backbone = model()
    before = backbone.state_dict().keys()
    with pytest.raises(gw.GraftError, match=words):
        gw.graft(backbone, gw.ConvAdapter(**options), head=False)
    assert backbone.state_dict().keys() == before
