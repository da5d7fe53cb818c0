"""Backbones whose linear weights are held in few bits: every method works there as on the numbers that the codes stand for.

The float twin of a quantised backbone has the dequantised weights. `make test-quantised` installs what this needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import graftwork as gw
from graftwork.core.quantised import is_quantised
from graftwork.core.weight import weight_of

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test-quantised")

FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
FOUR = [form for form in FORMS if form != "int8"]
WEIGHTS = [
    "lora(r=4)",
    "dora(r=4)",
    "pissa(r=4)",
    "vera(r=8)",
    "loha(r=2)",
    "oft(block_size=8)",
    "ia3",
    "neuroada(k=2)",
]
OTHERS = ["bottleneck(d=4)", "prefix(length=3)", "full(at='norm')", "full(at='q')"]
IDS = torch.arange(14).view(2, 7) * 5 % 64
Load = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = tmp_path_factory.mktemp("backbone")
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def load(saved: Path) -> Load:
    def loaded(form: str | None, **options: Any) -> LlamaForCausalLM:
        if form is not None:
            options["quantization_config"] = BitsAndBytesConfig(**FORMS[form])
        return LlamaForCausalLM.from_pretrained(saved, **options).eval()

    return loaded


def numbers(layer: nn.Module) -> Tensor:
    """What a layer's codes stand for, by bitsandbytes itself: its product with the identity, or its own functions."""
    own = layer.weight
    if hasattr(own, "quant_state"):
        return bnb.functional.dequantize_4bit(own.data, own.quant_state)
    return bnb.functional.int8_vectorwise_dequant(own.data, own.SCB if own.SCB is not None else layer.state.SCB)


def quantised(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from (
        (path, m) for path, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    )


@torch.no_grad()
def twin(model: nn.Module, load: Load) -> LlamaForCausalLM:
    """The float model with the numbers that the codes stand for."""
    plain = load(None)
    for path, layer in quantised(model):
        plain.get_submodule(path).weight.copy_(numbers(layer))
    return plain


def stir(adapter: gw.Adapter) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.02 * torch.randn_like(p)


def train(model: nn.Module, adapter: gw.Adapter, steps: int = 8, lr: float = 0.1) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in adapter.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
                    p.grad = None
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("form", FORMS)
def test_the_view_has_the_shape_and_the_numbers_of_the_weight(form: str, load: Load) -> None:
    model = load(form)
    layer = model.model.layers[0].mlp.down_proj
    view = weight_of(layer)
    assert view.shape == view.stored == (128, 256)
    assert is_quantised(layer, "weight") and not is_quantised(model.lm_head, "weight")
    before = numbers(layer)
    torch.testing.assert_close(view.dense(layer.weight), before, rtol=1e-6, atol=0)
    torch.testing.assert_close(view.dense(layer.weight.detach()), before, rtol=1e-6, atol=0)
    logits(model)  # 8 bit: the scales are now the layer's; 4 bit, on some CPUs: another order, and scales in bfloat16
    torch.testing.assert_close(view.dense(layer.weight.detach()), before, rtol=2**-8, atol=0)
    gw.graft(model, "lora", name="a")
    torch.testing.assert_close(numbers(layer), before, rtol=2**-8, atol=0)
    assert torch.equal(view.dense(layer.weight), numbers(layer)) or form == "int8"


@pytest.mark.parametrize("form", FORMS)
def test_lora_adds_its_update_to_the_product_of_the_codes(form: str, load: Load) -> None:
    model = load(form)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 128, requires_grad=True)  # bitsandbytes computes otherwise where nothing asks for a gradient
    base = layer(x).detach()
    adapter = gw.graft(model, gw.LoRA(r=4, alpha=12.0, at="q"), name="a")
    stir(adapter)
    delta = next(iter(adapter.parts[0].deltas.values()))
    gw.activate(model, "a")
    torch.testing.assert_close(layer(x), base + 3.0 * x @ (delta.up @ delta.down).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "method", ["lora(r=4)", "dora(r=4)", "oft(block_size=8)", "loha(r=2)", "ia3", "bottleneck(d=4)"]
)
@pytest.mark.parametrize("form", FOUR)
def test_values_and_gradients_are_those_on_the_dequantised_backbone(form: str, method: str, load: Load) -> None:
    model = load(form)
    pair = []
    for m in (model, twin(model, load)):
        adapter = gw.graft(m, method, name="a", seed=0)
        stir(adapter)
        out = m(IDS, labels=IDS)
        out.loss.backward()
        pair.append((out.logits, {n: p.grad for n, p in adapter.named_parameters()}, logits(m)))
    (ours, grads, quiet), (theirs, expected, _) = pair
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quiet, theirs, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected.keys()
    for name, g in expected.items():
        assert grads[name] is not None, name
        assert (grads[name] - g).norm() <= 1e-4 * g.norm(), name


@pytest.mark.parametrize("method", [*WEIGHTS, *OTHERS])
@pytest.mark.parametrize("form", ["nf4 twice", "int8"])
def test_a_method_trains_and_comes_back_to_the_bit(form: str, method: str, load: Load, tmp_path: Path) -> None:
    model = load(form)
    base = logits(model)
    adapter = gw.graft(model, method, name="a", seed=0)
    codes = {path: layer.weight.detach().clone() for path, layer in quantised(model)}
    losses = train(model, adapter)
    assert losses[-1] < losses[0] - 1e-4
    assert all(torch.equal(layer.weight, codes[path]) for path, layer in quantised(model))
    trained = logits(model)
    gw.save(model, "a", tmp_path / "a")
    gw.remove(model, "a")
    assert torch.equal(logits(model), base)
    gw.load(model, tmp_path / "a", name="a")
    assert torch.equal(logits(model), trained)


def test_gradients_pass_a_layer_that_was_in_its_form_for_inference(load: Load) -> None:
    """bitsandbytes leaves that form for no training of its own: on a CPU with bfloat16 products, gradients end there."""
    model = load("nf4")
    logits(model)
    adapter = gw.graft(model, "lora(r=4)", name="a", seed=0)
    stir(adapter)
    layer = model.model.layers[1].mlp.gate_proj
    x = torch.randn(4, 128, requires_grad=True)
    gw.activate(model, None)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, numbers(layer).sum(0).expand(4, 128))


def test_an_adapter_loads_on_the_float_backbone_and_is_merged_there(load: Load, tmp_path: Path) -> None:
    model = load("nf4")
    adapter = gw.graft(model, "lora(r=4)", name="a", seed=0)
    train(model, adapter)
    with pytest.raises(gw.GraftError, match="quantised"):
        gw.merge(model)
    trained = logits(model)
    assert gw.active(model) == "a"
    gw.save(model, "a", tmp_path / "a")
    plain = load(None)
    gw.load(plain, tmp_path / "a", name="a")
    there = logits(plain)
    assert (there - trained).abs().max() < 0.3 < (there - logits(load(None))).abs().max()  # the rounding of nf4
    gw.merge(plain)
    torch.testing.assert_close(logits(plain), there, rtol=1e-4, atol=1e-4)
    other = load(None)
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1.0)
    with pytest.raises(gw.GraftError, match="other weights"):
        gw.load(other, tmp_path / "a", name="a")


def test_a_refused_merge_changes_nothing(load: Load) -> None:
    model = load("nf4")
    gw.graft(model, "full(at='norm')", name="n", seed=0)  # could be merged
    stir(gw.graft(model, "dora(r=4)", name="a", seed=0))
    gw.activate(model, "n >> a")
    before, state = logits(model), {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(gw.GraftError, match="load it on the backbone loaded unquantised"):
        gw.merge(model)
    assert gw.active(model) == "n >> a"
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("expression", ["0.5*a + 0.5*b", "a >> b", "rows(a, b)"])
def test_expressions_are_those_on_the_dequantised_backbone(expression: str, load: Load) -> None:
    model = load("nf4")
    outs = []
    for m in (model, twin(model, load)):
        stir(gw.graft(m, "dora(r=4)", name="a", seed=0))
        stir(gw.graft(m, "ia3", name="b", seed=0))
        gw.activate(m, expression)
        outs.append(logits(m))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_values_and_counts_are_those_on_the_dequantised_backbone(load: Load) -> None:
    model = load("nf4")
    seen = []
    for m in (model, twin(model, load)):
        stir(gw.graft(m, "dora(r=4)", name="a", seed=0))
        stir(gw.graft(m, "lora(r=4)", name="b", seed=1))
        seen.append((gw.similarity(m, "a", "b"), str(gw.summary(m))))
    assert seen[0][0].sites == pytest.approx(seen[1][0].sites, rel=1e-4)
    assert seen[0][1] == seen[1][1]


def test_one_whole_weight_for_each_row_is_refused(load: Load) -> None:
    model = load("nf4")
    for name in "ab":
        gw.graft(model, "full(at='q')", name=name)
    with pytest.raises(gw.GraftError, match="the backbone holds it quantised"):
        gw.activate(model, "rows(a, b)")
    assert gw.active(model) == "b"


@pytest.mark.parametrize("method", ["lora(r=4)", "dora(r=4)", "full(at='q')", *OTHERS[:2]])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_parameters_have_the_dtype_of_the_activations(form: str, method: str, load: Load) -> None:
    model = load(form, dtype=torch.bfloat16)
    adapter = gw.graft(model, method, name="a")
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


def test_a_copy_of_the_model_reads_its_own_codes(load: Load) -> None:
    model = load("nf4")
    stir(gw.graft(model, "dora(r=4)", name="a", seed=0))
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    for delta in gw.adapters(other)["a"].parts[0].deltas.values():
        assert delta.view.codes is other.get_submodule(delta.key.split(":")[0])


def test_memory(load: Load) -> None:
    """The linear weights in 4 bits: 0.5 byte a number and a scale of 4 bytes for 64 (1 byte and 4 for 64 * 256, twice), instead of 4."""

    def held(model: nn.Module) -> int:
        states = [layer.weight.quant_state for _, layer in quantised(model)]
        scales = [s.absmax for s in states] + [s.state2.absmax for s in states if s.nested]
        return sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *scales])

    plain = held(load(None))
    linear = sum(weight_of(layer).d_in * weight_of(layer).d_out for _, layer in quantised(load("nf4")))
    for form, rate in (("nf4", 0.5 + 4 / 64), ("nf4 twice", 0.5 + 1 / 64)):
        model = load(form)
        saving = linear * (4 - rate)
        assert held(model) == pytest.approx(plain - saving, rel=0.01)
        adapter = gw.graft(model, "dora(r=4)", name="a")
        train(model, adapter, 2)
        logits(model)
        own = sum(p.nbytes for p in adapter.parameters())
        assert held(model) == pytest.approx(plain - saving + own, rel=0.01)
        plans = [m._armed.plan for _, m in quantised(model) if "_armed" in m.__dict__]
        assert sum(plan is not None for plan in plans) == 10  # q, k, v, up and down of two blocks
        assert not any(plan._kept for plan in plans if plan is not None)  # a float backbone's inference keeps W'


def test_tensors_that_hide_their_codes(load: Load) -> None:
    """torchao's weights have the shape and the dtype of the weight, and none of its numbers."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: make test-quantised")
    model = load(None)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    plain = load(None)
    with torch.no_grad():
        for path, m in model.named_modules():
            if isinstance(m, nn.Linear):
                plain.get_submodule(path).weight.copy_(m.weight.dequantize())
    for method in ("lora(r=4)", "dora(r=4)", "pissa(r=4)", "bottleneck(d=4)"):
        outs = []
        for m in (model, plain):
            adapter = gw.graft(m, method, name="a", seed=0)
            stir(adapter)
            out = m(IDS, labels=IDS)
            out.loss.backward()
            outs.append((out.logits, logits(m), [p.grad for p in adapter.parameters()]))
            if m is model and method != "bottleneck(d=4)":
                with pytest.raises(gw.GraftError, match="quantised"):
                    gw.merge(m)
            gw.remove(m, "a")
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_a_weight_of_unknown_codes_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(layer)
    with pytest.raises(gw.GraftError, match="does not say how it was quantised"):
        gw.graft(model, "dora(r=2, at='linear')", name="a")
    assert not gw.adapters(model)
    x = torch.randn(2, 4)
    view = weight_of(layer)
    assert torch.equal(F.linear(x, view.decoded(torch.eye(4))), x)  # numbers of that shape are taken as they are
