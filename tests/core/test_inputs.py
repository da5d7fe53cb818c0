"""Inputs that are made again instead of kept, and what the sites that read one input share."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance.hosts import bert, llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graftwork as gw
from graftwork.products.inputs import Input, input_of
from graftwork.products.lowrank import LowRankProduct
from graftwork.products.replay import recipe


def grows(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


MADE: dict[str, Callable[[], Tensor]] = {
    "a product": lambda: grows(3, 4) * grows(3, 4),
    "an RMS norm": lambda: torch.randn(4) * (h := grows(3, 4)) .mul(torch.rsqrt(h.pow(2).mean(-1, keepdim=True))),
    "an RMS norm in half precision": lambda: torch.randn(4).bfloat16()
    * ((h := grows(3, 4)) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))).to(torch.bfloat16),
    "gelu": lambda: F.gelu(grows(3, 4)),
    "gelu, approximated": lambda: F.gelu(grows(3, 4), approximate="tanh"),
    "silu": lambda: F.silu(grows(3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_it_is_made_again_to_the_bit(name: str) -> None:
    x = MADE[name]()
    make = recipe(x)
    assert make is not None
    again = make()
    assert again is not x and again.dtype == x.dtype
    torch.testing.assert_close(again, x, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False), nn.LayerNorm((5, 6))])
def test_a_layer_norm_is_made_again(norm: nn.LayerNorm) -> None:
    for p in norm.parameters():
        nn.init.normal_(p)
    x = norm(grows(2, 5, 6))
    make = recipe(x)
    assert make is not None
    torch.testing.assert_close(make(), x)


def written() -> Tensor:
    x = grows(3) * grows(3)
    with torch.no_grad():
        x.add_(1)
    return x


NOT_MADE: dict[str, Callable[[], Tensor]] = {
    "a product with a number": lambda: grows(3, 4) * 0.3,  # its factor is kept by nobody
    "a leaf": lambda: grows(3),
    "without a gradient": lambda: torch.ones(3) * 2,
    "written to in place": written,
    "a view": lambda: (grows(4) * grows(4)).view(2, 2),
    "a sum": lambda: grows(3) + 1,
    "a factor that nobody keeps": lambda: torch.ones(3) * (grows(3) + 1),
}


@pytest.mark.parametrize("name", NOT_MADE)
def test_anything_else_is_kept(name: str) -> None:
    assert recipe(NOT_MADE[name]()) is None


def test_hooks_on_saved_tensors_decide_alone() -> None:
    x = grows(3) * grows(3)
    assert recipe(x) is not None
    with torch.autograd.graph.save_on_cpu():
        assert recipe(x) is None


def kept(loss: Tensor, model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Every storage that the graph of the loss keeps, parameters and buffers aside: its address and a shape it has."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    out: dict[int, tuple[int, ...]] = {}
    todo: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in [*values, *getattr(node, "saved_tensors", ())]:
            for t in value if isinstance(value, tuple | list) else [value]:
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in own and t.numel() > 1:
                    out[t.untyped_storage().data_ptr()] = tuple(t.shape)
    return out


def run(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(input_ids=ids)
    return out.logits.float().pow(2).sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("backbone", "at"), [(llama, "q, k, v, o, gate, up, down"), (bert, "q, k, v, o, up, down")])
def test_lora_keeps_thin_products_and_no_activation_beyond_the_frozen_backbone(
    backbone: Callable[[], nn.Module], at: str
) -> None:
    torch.manual_seed(0)
    model = backbone().eval()
    ids = torch.randint(5, 30, (1, 7))  # few positions: no dense weight is made
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # the frozen bound: a gradient through everything
    frozen = sorted(kept(run(model, ids), model).values())
    model.get_input_embeddings().weight.requires_grad_(False)
    gw.graft(model, gw.LoRA(r=2, at=at), head=False)
    model.get_input_embeddings().weight.requires_grad_(True)
    grafted = sorted(kept(run(model, ids), model).values())
    more = list(grafted)
    for shape in frozen:
        assert shape in more, f"{shape} is no longer kept, so this comparison means nothing"
        more.remove(shape)
    assert set(more) == {(2, 7)}, "thin products [r, N] only"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("backbone", [llama, bert])
@pytest.mark.parametrize("make", [gw.LoRA, gw.VeRA, gw.AdaLoRA, gw.DoRA])
def test_gradients_are_those_with_everything_kept(make: Any, backbone: Callable[[], nn.Module], dropout: float) -> None:
    if make is gw.DoRA and dropout:
        dropout = 0.0
    torch.manual_seed(0)
    model = backbone()
    options = {"r": 4} if make is not gw.AdaLoRA else {}
    adapter = gw.graft(model, make(at="linear", dropout=dropout, **options), head=False)
    model.train()
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.3)
    ids = torch.randint(5, 30, (3, 7))

    def gradients(keep_all: bool) -> list[Tensor]:
        torch.manual_seed(5)
        if keep_all:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                loss = run(model, ids)
        else:
            loss = run(model, ids)
        return list(torch.autograd.grad(loss, [p for p in adapter.parameters() if p.requires_grad]))

    for ours, plain in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


THROUGH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a product": lambda z, gate: z * gate,
    "a layer norm": lambda z, gate: F.layer_norm(z, (4,), gate[0], gate[1], eps=0.1),
    "gelu": lambda z, gate: F.gelu(z),
    "silu": lambda z, gate: F.silu(z),
}


@pytest.mark.parametrize("name", THROUGH)
def test_second_derivatives_pass_through_an_input_that_is_made_again(name: str) -> None:
    torch.manual_seed(0)
    w, z, gate, down, up = (torch.randn(s, dtype=torch.float64) for s in [(5, 4), (3, 4), (3, 4), (2, 4), (5, 2)])
    inputs = tuple(t.requires_grad_() for t in (z, gate, down, up))

    def product(z: Tensor, gate: Tensor, down: Tensor, up: Tensor) -> Tensor:
        x = THROUGH[name](z, gate)
        shared = Input(x)
        assert shared.keep(x) is None
        out = LowRankProduct.apply(x, w, None, down, up, 0.7, 0.0, (), shared)
        return out + 0 * gate.sum()  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


class Three(nn.Module):
    """q, k and v of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        return torch.stack([self.q(h), self.k(h), self.v(h)])


def three(dropout: float, method: Any = gw.LoRA) -> tuple[nn.Module, Any]:
    """All sites with the values of one, so that what they differ by is their draws."""
    torch.manual_seed(0)
    model = Three().train()
    adapter = gw.graft(model, method(r=4, at="/./", dropout=dropout), head=False)
    with torch.no_grad():
        for other in (model.k, model.v):
            other.weight.copy_(model.q.weight)
            other.bias.copy_(model.q.bias)
        first, *others = (list(d.parameters()) for d in adapter.deltas())
        for p, *twins in zip(first, *others, strict=True):
            p.normal_()
            for twin in twins:
                twin.copy_(p)
    return model, adapter


def test_sites_that_read_one_input_share_one_draw_and_each_pass_draws_anew() -> None:
    model, _ = three(0.5)
    x = grows(6, 64)
    q, k, v = model(x)
    assert torch.equal(q, k) and torch.equal(k, v)
    assert not torch.equal(q, model(x)[0])


def test_a_second_use_of_one_site_on_the_same_tensor_draws_anew() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).train()
    adapter = gw.graft(model, gw.LoRA(r=4, at="linear", dropout=0.5), head=False)
    for p in adapter.parameters():
        nn.init.normal_(p)
    x = grows(6, 64)
    assert not torch.equal(model(x), model(x))  # SimCSE, R-Drop


def test_a_retained_graph_gives_the_same_gradients_twice() -> None:
    for dropout in (0.0, 0.5):
        model, adapter = three(dropout)
        out = model(grows(6, 64)).pow(2).sum()
        once = torch.autograd.grad(out, list(adapter.parameters()), retain_graph=True)
        twice = torch.autograd.grad(out, list(adapter.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_in_both_passes(reentrant: bool) -> None:
    model, adapter = three(0.5)
    x = grows(6, 64)
    torch.manual_seed(2)
    plain = torch.autograd.grad(model(x).pow(2).sum(), list(adapter.parameters()))
    torch.manual_seed(2)
    checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
    for ours, p in zip(plain, adapter.parameters(), strict=True):
        torch.testing.assert_close(p.grad, ours)


def test_nothing_is_held_once_input_and_output_are_gone() -> None:
    model, _ = three(0.5)
    x = grows(6, 64)
    out = model(x)
    node = weakref.ref(x)
    probe = grows(6, 64) * 1.0
    record = weakref.ref(input_of(probe, object()))
    assert record() is not None
    del probe
    gc.collect()
    assert record() is None
    del x, out
    gc.collect()
    assert node() is None


def test_a_frozen_matrix_that_sites_share_is_multiplied_once_in_the_backward_pass() -> None:
    model, _ = three(0.0, lambda **given: gw.VeRA(**{**given, "r": 32}))
    out = model(grows(600, 64))  # many positions: W' is dense, and A x is needed backwards only
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as recorded:
        out.pow(2).sum().backward()
    products = [e for e in recorded.events() if e.name == "aten::mm" and e.input_shapes == [[32, 64], [64, 600]]]
    assert len(products) == 1


def test_inference_tensors_pass() -> None:
    model, _ = three(0.3)
    with torch.inference_mode():
        assert model(torch.randn(2, 64)).isfinite().all()
