"""S2A (2025): the acceptance checks of the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from adapter_models import closed_form, on_meta
from attention_models import batch, make, run, scatter
from torch import Tensor, nn

import graftwork as gw
from graftwork.methods.side.forms.codes import pack, unpack
from graftwork.methods.side.forms.packing import Packing

pytestmark = pytest.mark.system("s2a")


def kept(compute: Callable[[], Tensor], besides: nn.Module | None = None) -> int:
    """Bytes of the tensors that a computation keeps for its backward pass, those of `besides` (weights) not counted."""
    known = set() if besides is None else {p.untyped_storage().data_ptr() for p in besides.parameters()}
    storages: dict[int, int] = {}
    held = []

    def note(t: Tensor) -> Tensor:
        held.append(t)  # so that no storage is used twice
        if t.untyped_storage().data_ptr() not in known:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = compute()
    assert out.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_s2a__codes_are_the_nearest(bits: int, n: int) -> None:
    torch.manual_seed(0)
    values = torch.rand(n) * 3 - 1
    codes = pack(values, bits, -1.0, 2.0)
    assert codes.packed.dtype == torch.uint8 and codes.packed.numel() == -(-n * bits // 8)
    assert (unpack(codes, bits, torch.float32) - values).abs().max() <= 3 / (2**bits - 1) / 2 + 1e-6


def test_s2a__a_frozen_linear_with_a_trained_bias_keeps_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    gw.graft(model, gw.BitFit(at="/./"), head=False)
    x = torch.randn(5, 8)
    assert kept(lambda: model(x), model) == 0
    twin = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    gw.graft(twin, gw.LoRA(r=1, at="/./"), head=False)
    assert kept(lambda: twin(x), twin) >= 5 * 8 * 4


@pytest.mark.parametrize("function", [F.gelu, F.silu, lambda x: F.gelu(x, approximate="tanh")])
def test_s2a__half_a_byte_for_each_number(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(64, 32, requires_grad=True)
    with Packing(4):
        assert 64 * 32 / 2 <= kept(lambda: function(x)) <= 64 * 32 / 2 + 64
    assert kept(lambda: function(x)) == 64 * 32 * 4


def test_s2a__the_gradient_of_relu_is_exact_and_that_of_gelu_is_half_a_step_off() -> None:
    x = torch.linspace(-8, 8, 4001, requires_grad=True)
    for function, bound in ((F.relu, 0.0), (F.gelu, 1.26 / 15 / 2), (F.silu, 1.2 / 15 / 2)):
        (exact,) = torch.autograd.grad(function(x).sum(), x)
        with Packing(4):
            y = function(x)
        assert torch.equal(y, function(x))
        (coded,) = torch.autograd.grad(y.sum(), x)
        error = (coded - exact).abs().max()
        assert error <= bound + 1e-6 and (error > 0) == (bound > 0)
    with Packing(4):
        assert kept(lambda: F.relu(x)) <= 4001 / 8 + 64  # one bit


@pytest.mark.parametrize("function", [lambda x: torch.softmax(x, -1), lambda x: F.layer_norm(x, (16,))])
def test_s2a__softmax_and_layer_norm(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(32, 16, requires_grad=True), torch.randn(32, 16)
    (exact,) = torch.autograd.grad((function(x) * g).sum(), x)
    errors = []
    for bits in (2, 4, 8):
        with Packing(bits):
            y = function(x)
            assert kept(lambda: function(x)) <= 32 * 16 * bits / 8 + 32 * 4 + 64
        assert torch.equal(y, function(x))
        (coded,) = torch.autograd.grad((y * g).sum(), x)
        errors.append(((coded - exact).norm() / exact.norm()).item())
    assert errors[0] > errors[1] > errors[2] and errors[1] < 0.2 and errors[2] < 0.02


def test_s2a__a_trained_norm_gets_its_gradients() -> None:
    torch.manual_seed(0)
    norm, x, g = nn.LayerNorm(16), torch.randn(32, 16), torch.randn(32, 16)
    wants = torch.autograd.grad((norm(x) * g).sum(), list(norm.parameters()))
    x.requires_grad_(True)
    with Packing(8):
        y = norm(x)
    gains, shifts = torch.autograd.grad((y * g).sum(), list(norm.parameters()))
    torch.testing.assert_close(shifts, wants[1])
    assert (gains - wants[0]).abs().max() < 0.02 * wants[0].abs().max()


@pytest.mark.parametrize("kind", ["bert", "vit", "torch"])
def test_s2a__forward_values_are_the_same_bits(kind: str) -> None:
    given, outs = batch(kind), []
    for bits in (0, 4):
        model = make(kind)
        scatter(gw.graft(model, gw.S2A(r=4, bits=bits), head=False, seed=0))
        outs.append(run(model.train(), given, grad=True))
    assert torch.equal(*outs)


def vit() -> Any:
    config = T.ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return T.ViTForImageClassification(config)


def test_s2a__what_a_training_pass_keeps_is_measured() -> None:
    """A third of full fine-tuning or of low-rank adapters, half of the same without codes.

    Three quarters of what is left are the queries, keys, values and outputs of attention, which are products' inputs.
    """
    x = torch.randn(4, 3, 32, 32)
    sizes = {}
    for name, methods in {
        "s2a": gw.S2A(r=4),
        "plain": gw.S2A(r=4, bits=0),
        "lora": gw.LoRA(r=4, at="q, v, up, down"),
        "full": gw.Full(at="any"),
        "bottleneck": gw.Bottleneck(d=8),
    }.items():
        model = vit()
        gw.graft(model, methods, head=False)
        model.train()
        sizes[name] = kept(lambda: model(x).logits, model)
    assert min(sizes["full"], sizes["lora"]) > 3 * sizes["s2a"], sizes
    assert sizes["bottleneck"] > 2.1 * sizes["s2a"] and sizes["plain"] > 1.9 * sizes["s2a"], sizes


def test_s2a__a_toy_is_learnt_as_well_as_with_exact_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 3, 16, 16, generator=generator)
    signal = torch.randn(96, generator=generator)
    x, target = x + signal[:, None, None, None], signal + 0.5 * torch.randn(96, generator=generator)
    losses = {}
    for bits in (0, 4):
        model = make("vit")
        adapter = gw.graft(model, gw.S2A(r=4, bits=bits), head=True, seed=0)
        optimizer = torch.optim.Adam(list(adapter.parameters()), lr=3e-3)
        model.train()
        seen = []
        for _ in range(40):
            loss = (model(x).logits[:, 0] - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        losses[bits] = sum(seen[-5:]) / 5
        assert losses[bits] < 0.3 * seen[0]
    assert abs(losses[4] - losses[0]) <= 0.05 * losses[0], losses


def test_s2a__the_side_is_a_sum_over_pooled_states() -> None:
    model, given = make("bert", num_hidden_layers=3), batch("bert", side="right")
    adapter = gw.graft(model, gw.S2ASide(r=4), head=False)
    scatter(adapter)
    out = run(model, given)
    with gw.using(model, None), torch.no_grad():
        hidden = model(**given, output_hidden_states=True).hidden_states
    total: Any = 0
    for delta, h in zip([d for d in adapter.deltas() if hasattr(d, "up")], hidden[1:], strict=True):
        mean = torch.stack([row[m.bool()].mean(0) for row, m in zip(h, given["attention_mask"], strict=True)])
        total = total + delta.up(F.gelu(delta.down(mean)))
    torch.testing.assert_close(out, hidden[-1] + total[:, None])


def test_s2a__counts() -> None:
    model = on_meta(lambda: T.ViTForImageClassification(T.ViTConfig()))
    biases = closed_form(model, [gw.BitFit()])
    methods = gw.S2A()
    adapter = gw.graft(model, methods, head=False)
    assert adapter.num_parameters == closed_form(model, methods) == biases + 12 * (2 * 16 * 768 + 16 + 768)
    share = adapter.num_parameters / sum(p.numel() for n, p in model.named_parameters() if "graft" not in n)
    assert biases < 0.0013 * 86e6 and share < 0.009  # 0.9 % are reported, prompts included


def test_s2a__prompts_and_merging() -> None:
    model = make("bert-classifier")
    adapter = gw.graft(model, gw.S2A(r=4, prompt=gw.Prompt(length=3)), head=False)
    assert [m.name for m in adapter.methods] == ["bitfit", "prompt", "s2a_side"]
    run(model.train(), batch("bert"), grad=True).square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    with pytest.raises(gw.GraftError, match="merge"):
        gw.merge(model.eval())


def test_s2a__a_causal_stack_is_refused_when_its_mask_is_seen() -> None:
    config = T.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    model = T.BloomModel(config)
    gw.graft(model, gw.S2ASide(r=4), head=False)
    with pytest.raises(gw.GraftError, match="causal"):
        model(**batch("llama"))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("bert", {"bits": 3}, "3 bits"),
        ("bert", {"at": "block"}, "no top"),
        ("llama", {}, "causal"),
        ("resnet", {}, "one width"),
    ],
)
def test_s2a__what_cannot_be_is_refused_by_name(kind: str, options: dict[str, Any], words: str) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = T.ResNetModel(T.ResNetConfig(**sizes)) if kind == "resnet" else make(kind)
    with pytest.raises(gw.GraftError, match=words):
        gw.graft(model, gw.S2ASide(**options), head=False)
    assert not any("graft" in name for name, _ in model.named_modules())
