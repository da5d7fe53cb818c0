"""The low-rank product against its plain formula: values, gradients, what is kept for the backward pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graftwork as gw
from graftwork.products.dropout import drop, keep_mask
from graftwork.products.inputs import Input
from graftwork.products.lowrank import LowRankProduct, _pieces, dense_is_cheaper, low_rank

SIZE = st.integers(1, 7)


def tensors(n: int, d_in: int, d_out: int, r: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + d_in * 100 + d_out * 10 + r)
    shapes = [(n, d_in), (d_out, d_in), (d_out,), (r, d_in), (d_out, r)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@given(SIZE, SIZE, SIZE, SIZE, st.booleans())
@settings(max_examples=40, deadline=None)
def test_gradients_are_those_of_the_formula(n: int, d_in: int, d_out: int, r: int, biased: bool) -> None:
    x, w, b, down, up = tensors(n, d_in, d_out, r)
    x, down, up = (t.requires_grad_() for t in (x, down, up))
    bias = b if biased else None

    def product(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return LowRankProduct.apply(x, w, bias, down, up, 1.7, 0.0, (), Input(x))  # type: ignore[no-any-return]

    def formula(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(x, w, bias) + 1.7 * x @ down.T @ up.T

    torch.testing.assert_close(product(x, down, up), formula(x, down, up))
    assert torch.autograd.gradcheck(product, (x, down, up))
    assert torch.autograd.gradgradcheck(product, (x, down, up))


@pytest.mark.parametrize("trains_down", [True, False])
@pytest.mark.parametrize("n", [1, 40])
def test_a_large_rank_is_one_dense_weight_where_that_is_cheaper(n: int, trains_down: bool) -> None:
    x, w, b, down, up = tensors(n, 6, 5, 4)
    x, up = x.requires_grad_(), up.requires_grad_()
    down.requires_grad_(trains_down)
    assert dense_is_cheaper(x.dtype, n, 6, 5, 4) == (n == 40)
    out = LowRankProduct.apply(x, w, b, down, up, 1.3, 0.0, (), Input(x))
    expected = F.linear(x, w, b) + 1.3 * x @ down.T @ up.T
    torch.testing.assert_close(out, expected)
    wanted = [t for t in (x, down, up) if t.requires_grad]
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(y, wanted, grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    product = lambda *given: LowRankProduct.apply(given[0], w, b, down, given[1], 1.3, 0.0, (), Input(given[0]))  # noqa: E731
    assert torch.autograd.gradgradcheck(product, (x, up))


def test_thin_updates_and_half_precision_never_make_a_weight() -> None:
    assert not dense_is_cheaper(torch.float32, 10**6, 4096, 4096, 16)
    assert dense_is_cheaper(torch.float32, 1024, 512, 512, 256)
    assert not dense_is_cheaper(torch.bfloat16, 1024, 512, 512, 256)
    x, w, b, down, up = (t.bfloat16() for t in tensors(40, 6, 5, 4))
    saved_shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved_shapes.append(t.shape) or t, lambda t: t):
        LowRankProduct.apply(
            x.requires_grad_(), w, b, down, up.requires_grad_(), 1.0, 0.0, (), Input(x.requires_grad_())
        )
    assert torch.Size([4, 40]) in saved_shapes  # the thin product


@pytest.mark.parametrize("draws", [(), (2, 1)])
@pytest.mark.parametrize(("dropout", "n", "d_in"), [(0.1, 6, 5), (0.5, 6, 5), (0.9, 6, 5), (0.5, 700, 500)])
def test_dropout_has_the_same_masks_in_both_directions(
    dropout: float, n: int, d_in: int, draws: tuple[int, ...]
) -> None:
    x, w, b, down, up = tensors(n, d_in, 4, 3)
    with torch.no_grad():
        assert (len(_pieces(x)) > 1) == (n == 700)
    x, down, up = (t.requires_grad_() for t in (x, down, up))
    torch.manual_seed(3)
    thin = []
    for rows in down.split(draws or (3,)):
        keep, share = keep_mask(x, dropout)
        assert 0 < keep.sum() < keep.numel()
        thin.append((x * keep / share) @ rows.T)
    expected = F.linear(x, w, b) + 0.7 * torch.cat(thin, -1) @ up.T
    torch.manual_seed(3)
    out = LowRankProduct.apply(x, w, b, down, up, 0.7, dropout, draws, Input(x))
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, down, up), grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_outside_the_product_is_the_same_and_keeps_one_byte_a_number() -> None:
    x = torch.randn(40, 30, requires_grad=True)
    kept: list[Tensor] = []
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = drop(x, 0.3)
    torch.manual_seed(3)
    keep, share = keep_mask(x, 0.3)
    torch.testing.assert_close(out, x * keep / share)
    (g,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(g, keep / share)
    assert [t.dtype for t in kept if t.numel() > 1] == [torch.uint8]
    assert drop(x, 0.3, training=False) is x
    assert drop(x, 0.0) is x


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.3])
def test_dropout_keeps_with_its_probability(dropout: float) -> None:
    torch.manual_seed(0)
    like = torch.empty(2000, 1001)
    keep, share = keep_mask(like, dropout)
    assert abs(share - (1 - dropout)) < 1e-5
    spread = (dropout * (1 - dropout) / like.numel()) ** 0.5
    assert abs(keep.double().mean() - share) < 5 * spread
    other, _ = keep_mask(like, dropout)
    together = (keep & other).double().mean()  # independent draws
    assert abs(together - share**2) < 5 * (share**2 * (1 - share**2) / like.numel()) ** 0.5
    beside = (keep[:, 1:] & keep[:, :-1]).double().mean()  # independent neighbours
    assert abs(beside - share**2) < 8 * (share**2 * (1 - share**2) / like.numel()) ** 0.5


def saved(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the forward pass keeps for the backward pass, without parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum()
    return list(kept.values())


@pytest.mark.parametrize(("dropout", "bytes_each"), [(0.0, 0), (0.1, 1)])
def test_kept_for_backward_is_the_input_once_and_nothing_else_of_its_size(dropout: float, bytes_each: int) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 48) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x) + self.v(x)

    model = Shared()
    gw.graft(model, gw.LoRA(r=1, dropout=dropout, at="/./"), head=False)
    model.train()
    x = torch.randn(4, 10, 32, requires_grad=True)
    sizes = sorted(t.untyped_storage().nbytes() for t in saved(model, x))
    thin, masks = [4 * 40] * 3, [bytes_each * 40 * 32] if bytes_each else []  # one draw for the three
    assert sizes == sorted([*thin, *masks, 4 * x.numel()])


def test_a_weight_that_trains_gets_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    gw.graft(model, gw.LoRA(r=2, at="linear"), head=False)
    model[0].weight.requires_grad_(True)  # somebody thaws the backbone beneath the adapter
    x = torch.randn(5, 4)
    model(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, x.sum(0).expand(3, 4))


def test_the_plain_formula_serves_where_the_base_is_not_the_hosts_own() -> None:
    x, w, b, down, up = tensors(3, 4, 5, 2)
    host = SimpleNamespace(frozen_product=False)
    out = low_rank(x, lambda t: 2 * F.linear(t, w, b), host, down, up, 0.5)  # type: ignore[arg-type]
    torch.testing.assert_close(out, 2 * F.linear(x, w, b) + 0.5 * x @ down.T @ up.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_what_autocast_of_the_formula_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    adapter = gw.graft(model, gw.LoRA(r=2, at="linear"), head=False)
    (delta,) = adapter.deltas()
    nn.init.normal_(delta.up)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=dtype):
        out = model(x)
        thin = F.linear(x, delta.down)
        expected = F.linear(x, model[0].weight, model[0].bias) + delta.scale * F.linear(thin, delta.up)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)
    out.float().sum().backward()
    assert delta.down.grad is not None and delta.down.grad.dtype == torch.float32


def test_a_stack_of_two_trains_both() -> None:
    """The second delta's base is the first one's product, over an input [batch, seq, in]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    adapters = [gw.graft(model, gw.LoRA(r=2, at="/[01]/"), name, head=False) for name in "ab"]
    gw.activate(model, "a >> b")
    with torch.no_grad():
        for adapter in adapters:
            for p in adapter.parameters():
                p.normal_()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    out = model(x)
    out.square().sum().backward()
    merged = x
    deltas = [list(adapter.deltas()) for adapter in adapters]
    for layer, host in enumerate(m for m in model if isinstance(m, nn.Linear)):
        weight = host.weight + sum(d[layer].scale * d[layer].up @ d[layer].down for d in deltas)
        merged = merged @ weight.T + host.bias
    torch.testing.assert_close(out, merged)
    wanted = torch.autograd.grad(merged.square().sum(), [p for a in adapters for p in a.parameters()])
    for p, expected in zip((p for a in adapters for p in a.parameters()), wanted, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_others_may_add_to_the_product_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    lora = gw.graft(model, gw.LoRA(r=2, at="linear"), "a", head=False)
    bias = gw.graft(model, gw.BitFit(at="linear"), "b", head=False)
    gw.activate(model, "a >> b")
    for p in [*lora.parameters(), *bias.parameters()]:
        nn.init.normal_(p)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    out = model(x)
    (delta,), (shift,) = lora.deltas(), bias.parameters()
    expected = F.linear(x, model[0].weight + delta.scale * delta.up @ delta.down, model[0].bias) + shift
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.square().sum(), [shift])
    torch.testing.assert_close(grad, 2 * expected.sum((0, 1)))
