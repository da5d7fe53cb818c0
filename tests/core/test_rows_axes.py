"""Which axis has the rows is seen and not guessed: the lengths may be equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rows import BY_NAME, METHODS, alone, close, grafted, leave_init, output, together
from torch import Tensor, nn

import graftwork as gw


def two(model: nn.Module, at: str = "/site/") -> nn.Module:
    """The model with adapters a and b."""
    for name in "ab":
        leave_init(gw.graft(model.eval(), gw.LoRA(r=2, at=at), name, head=False), ord(name))
    return model


class Layout(nn.Module):
    """A site that sees tokens [batch, seq, d] in some layout, contiguous; what it gives back is [batch, seq, d]."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.first, self.site, self.layout = nn.Linear(8, 8), nn.Linear(8, 8), layout

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        h = self.first(x)
        match self.layout:
            case "batch, seq":
                return self.site(h)
            case "batch seq":
                return self.site(h.reshape(-1, d)).view(b, s, d)
            case "windows":
                return self.site(h.reshape(b * 2, s // 2, d)).view(b, s, d)
            case "shared":
                return h + self.site(self.first(torch.linspace(0, 1, s * d).view(1, s, d)))
            case "seq, batch":
                return self.site(h.transpose(0, 1).contiguous()).transpose(0, 1)
            case "seq batch":
                return self.site(h.transpose(0, 1).reshape(-1, d)).view(s, b, d).transpose(0, 1)
            case "row by row":
                return torch.stack([self.site(row) for row in h])
        raise AssertionError(self.layout)


@pytest.mark.parametrize("seq", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", ["batch, seq", "batch seq", "windows", "shared"])
def test_the_batch_in_front(layout: str, seq: int) -> None:
    seq = max(seq, 2) if layout == "windows" else seq
    model, inputs, names = two(Layout(layout)), {"x": torch.randn(4, seq, 8)}, ["a", "b", None, "a"]
    close(together(model, names, inputs), alone(model, names, inputs))


@pytest.mark.parametrize("seq", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["seq, batch", "seq batch", "row by row"])
def test_the_batch_elsewhere_is_refused_or_right(layout: str, seq: int) -> None:
    model, inputs, names = two(Layout(layout)), {"x": torch.randn(4, seq, 8)}, ["a", "b", None, "a"]
    if seq == 1 and layout == "seq batch":  # [batch, d]: there is one order only
        close(together(model, names, inputs), alone(model, names, inputs))
        with pytest.raises(gw.GraftError, match="axis 0"):  # what was seen of one position says nothing of several
            together(model, names, {"x": torch.randn(4, 4, 8)})
        return
    with pytest.raises(gw.GraftError, match="axis 0"):
        together(model, names, inputs)


@pytest.mark.parametrize("length", [3, 4, 5])
def test_prompts_as_long_as_the_batch(length: int) -> None:
    model = grafted("llama", *METHODS["lora of two ranks"])
    names: list[Any] = ["a", None, "b", "a"]
    ids = torch.randint(5, 48, (4, length), generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with gw.using(model, gw.rows(names)):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    for i, name in enumerate(names):
        with gw.using(model, name):
            want = model.generate(ids[i : i + 1], attention_mask=torch.ones_like(ids[:1]), **given)
        assert torch.equal(out[i], want[0])


def test_looking_leaves_no_trace() -> None:
    """The first pass with rows: the random state, the mode, the cache and the gradients are those of one pass."""
    model = grafted("llama", gw.LoRA(r=2), gw.LoRA(r=3))
    ids = torch.randint(5, 48, (3, 3))
    state = torch.get_rng_state()
    with gw.using(model, gw.rows(["a", "b", None])):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        assert cache.get_seq_length() == 3
        again = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        assert again.past_key_values.get_seq_length() == 4
        model.train()
        model(input_ids=ids).logits.sum().backward()
        assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_it_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = grafted("bert", gw.LoRA(r=2), gw.LoRA(r=3)), BY_NAME["bert"].inputs()
    calls: list[int] = []
    original = nn.Embedding.forward
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, x: calls.append(x.shape[0]) or original(self, x))
    together(model, ["a", "b", None], inputs)
    first = len(calls)
    together(model, ["b", "a", None], inputs)
    assert (len(calls) - first) * 3 == first  # the pass itself, and those with one row and with two
    close(together(model, ["a", "b", None], inputs), alone(model, ["a", "b", None], inputs))


@pytest.mark.parametrize("label", ["lora of two ranks", "ia3", "bottleneck", "prefix"])
def test_compiled(label: str) -> None:
    model, inputs, names = grafted("bert", *METHODS[label]), BY_NAME["bert"].inputs(), ["a", "b", None]
    want = alone(model, names, inputs)
    torch._dynamo.reset()
    gw.activate(model, gw.rows(names))
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        close(output(compiled, inputs), want)
        close(output(compiled, inputs), want)


@pytest.mark.parametrize("label", ["lora of two ranks", "ia3", "bottleneck", "dora", "bitfit", "prefix"])
def test_autocast(label: str) -> None:
    model, inputs, names = grafted("bert", *METHODS[label]), BY_NAME["bert"].inputs(), ["a", "b", None]
    exact = alone(model, names, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, want = together(model, names, inputs), alone(model, names, inputs)
    assert out.dtype == want.dtype
    error = (want.float() - exact.float()).abs().max()  # of half precision itself
    assert (out.float() - exact.float()).abs().max() <= 2 * error + 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("label", ["lora of two ranks", "ia3", "bottleneck", "dora", "prefix", "loreft"])
def test_gradient_checkpointing(label: str, reentrant: bool) -> None:
    model, inputs, names = grafted("llama", *METHODS[label]), BY_NAME["llama"].inputs(), ["a", "b", "a"]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        with gw.using(model, gw.rows(names)):
            model(**inputs, use_cache=False).logits.pow(2).sum().backward()
            found = {f"{n}/{k}": p for n, a in gw.adapters(model).items() for k, p in a.named_parameters()}
        return {k: p.grad.clone() for k, p in found.items() if p.grad is not None}

    model.train()
    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = gradients()
    assert got.keys() == want.keys() and len(want) > 2
    for key, g in want.items():
        close(got[key], g, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the sizes of a and b do not match")


def test_an_error_of_a_delta_is_not_taken_for_one_of_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = grafted("bert", *METHODS["bottleneck"]), BY_NAME["bert"].inputs()
    kind = type(next(gw.adapters(model)["a"].deltas()))
    calls: list[int] = []

    def broken(self: Any, x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the sizes of a and b do not match")
        return y

    monkeypatch.setattr(kind, "forward", broken)
    with pytest.raises(RuntimeError, match="the sizes of a and b"):
        together(model, ["a", "b", None], inputs)
    assert len(calls) == 1


def test_a_branch_on_values_runs_one_adapter_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, names = grafted("bert", *METHODS["bottleneck"]), BY_NAME["bert"].inputs(), ["a", "b", None]
    kind = type(next(gw.adapters(model)["a"].deltas()))
    own = kind.forward

    def branching(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return own(self, x, y) if bool((y > -1e9).all()) else y

    monkeypatch.setattr(kind, "forward", branching)
    close(together(model, names, inputs), alone(model, names, inputs))


def test_what_depends_on_the_pass_is_not_stacked() -> None:
    """A generated LoRA has other factors for each task: the context of the pass decides, not that of the activation."""
    method = gw.Generated(of=gw.LoRA(r=2), tasks=("x", "y"))
    model, inputs, names = grafted("bert", method, gw.LoRA(r=2)), BY_NAME["bert"].inputs(), ["a", "b", None]
    gw.activate(model, gw.rows(names))
    outs = []
    for task in ("x", "y", "x"):
        with gw.context(model, task=task):
            want = alone(model, names, inputs)
            outs.append(output(model, inputs))
            close(outs[-1], want)
    assert torch.equal(outs[0], outs[2]) and not torch.allclose(outs[0][0], outs[1][0], atol=1e-4)


@pytest.mark.parametrize("distinct", [1, 2])
def test_no_rows_at_all(distinct: int) -> None:
    model, inputs = grafted("bert", gw.LoRA(r=2), gw.LoRA(r=3)), BY_NAME["bert"].inputs()
    with pytest.raises(gw.GraftError, match=r"(?s)a batch of 0 and 2 names"):
        together(model, ["a", "b"][:distinct] * (3 - distinct), {k: v[:0] for k, v in inputs.items()})
