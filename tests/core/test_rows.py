"""One adapter per row of a batch: every row is what it is alone, and what cannot be so is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conformance.cases import close, leave_init
from conformance.hosts import BY_NAME, bert, forward, fresh, output
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor, nn

import graftwork as gw
from graftwork.expressions.algebra import A, Rows, Stack
from graftwork.grafting.install import root_of

METHODS: dict[str, tuple[Any, Any]] = {
    "lora": (gw.LoRA(r=3), gw.LoRA(r=3)),
    "lora of two ranks": (gw.LoRA(r=2), gw.LoRA(r=7, rslora=True)),
    "dora": (gw.DoRA(r=3), gw.DoRA(r=3)),
    "vera": (gw.VeRA(r=8), gw.VeRA(r=8)),
    "vera of two seeds": (gw.VeRA(r=8), gw.VeRA(r=8, seed=1)),
    "adalora": (gw.AdaLoRA(), gw.AdaLoRA()),
    "ia3": (gw.IA3(), gw.IA3()),
    "bitfit": (gw.BitFit(), gw.BitFit()),
    "ln_tuning": (gw.LNTuning(), gw.LNTuning()),
    "bottleneck": (gw.Bottleneck(d=4), gw.Bottleneck(d=4)),
    "two bottlenecks": (gw.Bottleneck(d=4), gw.Bottleneck(d=6, norm="after", act="relu")),
    "parallel": (gw.Parallel(d=4), gw.Parallel(d=4)),
    "residual": (gw.Bottleneck(d=4, position="residual", at="mlp"), gw.Bottleneck(d=4, position="before", at="mlp")),
    "loreft": (gw.LoReFT(r=2, positions="p1+s1"), gw.LoReFT(r=2, positions="p1+s1")),
    "phm": (gw.PHM(d=8), gw.PHM(d=8)),
    "compacter": (gw.Compacter(reduction=3), gw.Compacter(reduction=3)),
    "prefix": (gw.Prefix(length=3), gw.Prefix(length=5, reparam="mlp", mid=4)),
    "llama_adapter": (gw.LlamaAdapter(length=3), gw.LlamaAdapter(length=2)),
    "embedding": (gw.LoRA(r=2, at="embed, q"), gw.LoRA(r=3, at="embed, q")),
    "whole linear": (gw.Full(at="q"), gw.Full(at="q")),
    "mixture": (gw.Mixture(of=gw.LoRA(r=2)), gw.Mixture(of=gw.IA3(), experts=3)),
    "mixtures of vectors": (gw.Mixture(of=gw.IA3()), gw.Mixture(of=gw.IA3())),
    "generated": (gw.Generated(of=gw.Bottleneck(d=3)), gw.Generated(of=gw.Bottleneck(d=3))),
    "sparse": (gw.Sparse(of=gw.Bottleneck(d=4)), gw.Sparse(of=gw.LoRA(r=4))),
    "lora, bottleneck": (gw.LoRA(r=2), gw.Bottleneck(d=3)),
    "dora, ia3": (gw.DoRA(r=2), gw.IA3()),
    "lora and ia3 on one layer": ([gw.LoRA(r=2), gw.IA3()], [gw.IA3(), gw.LoRA(r=4)]),
    "mam, bitfit": (gw.MAM(length=2, d=4, mid=4), gw.BitFit()),
}
# of the combinations below, those where the method has no site
ABSENT = {("bert", "residual"), ("vit", "embedding"), ("llama", "bitfit"), ("llama", "mam, bitfit")}


def grafted(host: str, *methods: Any, head: bool | None = False) -> nn.Module:
    """The host's model with adapters a, b, ... away from their initial values."""
    model = fresh(BY_NAME[host])
    for name, method in zip("abcdefgh", methods, strict=False):
        leave_init(gw.graft(model, method, name, head=head, seed=ord(name)), ord(name))
    return model


def placed(method: Any, at: str | None) -> Any:
    """The method, or each of a list, at other sites."""
    if isinstance(method, list):
        return [placed(m, at) for m in method]
    return method if at is None else dataclasses.replace(method, at=at)


def alone(model: nn.Module, names: Sequence[Any], inputs: dict[str, Tensor]) -> Tensor:
    """Each row in a batch of its own, under its own adapter."""
    outs = []
    for i, name in enumerate(names):
        with gw.using(model, name):
            outs.append(output(model, {k: v[i : i + 1] for k, v in inputs.items()}))
    return torch.cat(outs)


def together(model: nn.Module, names: Sequence[Any], inputs: dict[str, Tensor]) -> Tensor:
    with gw.using(model, gw.rows(names)):
        return output(model, inputs)


PLACES = [(host, label) for host in ("bert", "llama", "vit") for label in METHODS if (host, label) not in ABSENT]


@pytest.mark.parametrize(("host", "label"), PLACES)
def test_each_row_is_what_it_is_alone(host: str, label: str) -> None:
    model, inputs = grafted(host, *METHODS[label]), BY_NAME[host].inputs()
    bare = alone(model, [None] * 3, inputs)
    for names in (["a", "b", None], ["b", "a", "b"], [None, "a", "a"]):
        out, want = together(model, names, inputs), alone(model, names, inputs)
        close(out, want)
        assert torch.equal(out, together(model, names, inputs))  # nothing is used up by a pass
        for row, name in enumerate(names):
            if name is None:
                with gw.using(model, None):
                    assert torch.equal(out[row], output(model, inputs)[row])
            else:
                assert not torch.allclose(out[row], bare[row], atol=1e-4)
    assert not torch.allclose(alone(model, ["a"] * 3, inputs), alone(model, ["b"] * 3, inputs), atol=1e-4)


@pytest.mark.parametrize(
    "host", ["conv2d", "conv2d_reflect", "conv1d", "embedding", "packed_qkv", "gpt2", "t5", "linear_wide"]
)
@pytest.mark.parametrize(
    "label", ["lora", "lora of two ranks", "dora", "ia3", "dora, ia3", "lora and ia3 on one layer"]
)
def test_every_kind_of_host(host: str, label: str) -> None:
    kind = BY_NAME[host]
    methods = [placed(m, kind.at) for m in METHODS[label]]
    model, inputs = grafted(host, *methods), kind.inputs()
    for names in (["a", "b", None], ["b", "a", "a"]):
        close(together(model, names, inputs), alone(model, names, inputs))


@given(st.lists(st.sampled_from(["a", "b", "c", None, "a >> b", "c >> a"]), min_size=1, max_size=9))
@limits(max_examples=30, deadline=None)
def test_any_assignment(names: list[str | None]) -> None:
    ids = torch.randint(5, 48, (len(names), 6), generator=torch.Generator().manual_seed(len(names)))
    close(together(MODEL, names, {"input_ids": ids}), alone(MODEL, names, {"input_ids": ids}))


MODEL = grafted("llama", gw.LoRA(r=2), gw.Bottleneck(d=3), [gw.IA3(), gw.LoRA(r=5)])


def test_the_same_adapter_in_all_rows_is_the_adapter() -> None:
    model, inputs = grafted("bert", gw.LoRA(r=2), gw.LoRA(r=2)), BY_NAME["bert"].inputs()
    with gw.using(model, "a"):
        assert torch.equal(together(model, ["a"] * 3, inputs), output(model, inputs))
    with gw.using(model, "a >> b"):
        assert torch.equal(together(model, ["a >> b"] * 3, inputs), output(model, inputs))
    with gw.using(model, None):
        assert torch.equal(together(model, [None] * 3, inputs), output(model, inputs))


def test_one_adapter_in_two_stacks_that_edits_a_norms_input() -> None:
    before = gw.Bottleneck(d=4, position="before", at="mlp")
    model, inputs = grafted("llama", before, gw.LoRA(r=2), before), BY_NAME["llama"].inputs()
    for names in (["a >> b", "a", None], ["c >> a", "a", "a >> b"]):
        close(together(model, names, inputs), alone(model, names, inputs))


def test_one_row() -> None:
    model, inputs = grafted("bert", gw.DoRA(r=2)), {k: v[:1] for k, v in BY_NAME["bert"].inputs().items()}
    assert torch.equal(together(model, ["a"], inputs), alone(model, ["a"], inputs))


def test_the_text_reads_back() -> None:
    e = gw.rows(["a", "b", None, "a >> b", gw.A("none"), gw.A("two words"), "rows"])
    assert str(e) == 'rows(a, b, none, a >> b, "none", "two words", rows)'
    assert gw.parse(str(e)) == e
    assert gw.parse("rows(a, none) >> c") == Rows((Stack((A("a"), A("c"))), A("c"))) == gw.rows(["a", None]) >> "c"
    model = grafted("bert", gw.LoRA(r=2), gw.IA3())
    gw.activate(model, "rows(a, b, none)")
    assert gw.active(model) == "rows(a, b, none)"
    with gw.using(model, "a"):
        pass
    assert gw.active(model) == "rows(a, b, none)"
    close(output(model, BY_NAME["bert"].inputs()), alone(model, ["a", "b", None], BY_NAME["bert"].inputs()))


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["lora of two ranks", "ia3", "bottleneck", "prefix", "dora", "loreft"])
@pytest.mark.parametrize("cached", [True, False])
def test_generate(label: str, cached: bool) -> None:
    model, ids = grafted("llama", *METHODS[label]), BY_NAME["llama"].inputs()["input_ids"]
    names = ["a", None, "b"]
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached}
    with gw.using(model, gw.rows(names)):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    for i, name in enumerate(names):
        with gw.using(model, name):
            want = model.generate(ids[i : i + 1], attention_mask=torch.ones_like(ids[:1]), **given)
        assert torch.equal(out[i], want[0])


@pytest.mark.parametrize("host", ["llama", "t5"])
def test_beams(host: str) -> None:
    model, ids = grafted(host, gw.LoRA(r=2), gw.Bottleneck(d=3)), BY_NAME[host].inputs()["input_ids"]
    names, given = (
        ["a", None, "b"],
        {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    )
    with gw.using(model, gw.rows(names)):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    for i, name in enumerate(names):
        with gw.using(model, name):
            want = model.generate(ids[i : i + 1], attention_mask=torch.ones_like(ids[:1]), **given)
        assert torch.equal(out[2 * i : 2 * i + 2], want)


# --- gradients, changes, copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label", ["lora of two ranks", "ia3", "bitfit", "bottleneck", "dora", "vera", "prefix", "compacter", "dora, ia3"]
)
def test_gradients_reach_each_adapter(label: str) -> None:
    model, inputs = grafted("bert", *METHODS[label]), BY_NAME["bert"].inputs()
    names = ["a", "b", "a"]

    def gradients() -> dict[str, Tensor]:
        found = {f"{n}/{k}": p.grad for n, a in gw.adapters(model).items() for k, p in a.named_parameters()}
        for a in gw.adapters(model).values():
            for p in a.parameters():
                p.grad = None
        return {k: g for k, g in found.items() if g is not None}

    with gw.using(model, gw.rows(names)):
        forward(model, inputs).pow(2).sum().backward()
    got = gradients()
    for i, name in enumerate(names):
        with gw.using(model, name):
            forward(model, {k: v[i : i + 1] for k, v in inputs.items()}).pow(2).sum().backward()
    want = gradients()
    assert got.keys() == want.keys() and len(got) > 2
    for key, g in want.items():
        close(got[key], g, 1e-4)


def test_a_changed_parameter_is_seen() -> None:
    model, inputs = grafted("bert", gw.LoRA(r=2), gw.Bottleneck(d=3)), BY_NAME["bert"].inputs()
    names = ["a", "b", "a"]
    gw.activate(model, gw.rows(names))
    first = output(model, inputs)
    with torch.no_grad():
        for p in gw.adapters(model)["a"].parameters():
            p.mul_(1.5)
    second = output(model, inputs)
    assert not torch.allclose(first[0], second[0], atol=1e-3) and torch.equal(first[1], second[1])
    close(second, alone(model, names, inputs))
    optimiser = torch.optim.SGD([p for a in gw.adapters(model).values() for p in a.parameters()], lr=0.1)
    loss = forward(model, inputs).pow(2).sum()
    between = output(model, inputs)  # a stack of the old values, made after the loss
    loss.backward()
    optimiser.step()
    after = output(model, inputs)
    assert not torch.allclose(after, between, atol=1e-3)
    close(after, alone(model, names, inputs))


def test_another_assignment_keeps_the_stacks() -> None:
    model, inputs = grafted("bert", gw.LoRA(r=2), gw.LoRA(r=3)), BY_NAME["bert"].inputs()
    together(model, ["a", "b", None], inputs)
    stacks = root_of(model).runtime.stacks
    kept = {key: id(value[1]) for key, value in stacks.items()}
    assert kept
    close(together(model, [None, "b", "a"], inputs), alone(model, [None, "b", "a"], inputs))
    assert {key: id(value[1]) for key, value in stacks.items()} == kept
    gw.remove(model, "b")
    assert not stacks


def test_stacks_do_not_pile_up() -> None:
    model, inputs = grafted("bert", *(gw.LoRA(r=2), gw.LNTuning()) * 3), BY_NAME["bert"].inputs()
    for names in (["a", "b", None], ["c", "d", None], ["e", "f", None], ["a", "b", None], ["b", "a", None]):
        together(model, names, inputs)
    runtime = root_of(model).runtime
    assert 0 < len(runtime.stacks) == len(set(runtime.stacks)) and len(runtime.stacks) <= len(grafted_modules(model))


def grafted_modules(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if "graft" in m._modules]


def test_a_rotation_from_a_file_that_is_trained_on(tmp_path: Any) -> None:
    model, inputs = grafted("llama", *METHODS["loreft"]), BY_NAME["llama"].inputs()
    for name in "ab":
        gw.save(model, name, tmp_path / name)
        gw.remove(model, name)
        gw.load(model, tmp_path / name, name)
    close(together(model, ["a", "b", None], inputs), alone(model, ["a", "b", None], inputs))
    model = copy.deepcopy(model)
    for adapter in gw.adapters(model).values():
        leave_init(adapter)
    close(together(model, ["a", "b", None], inputs), alone(model, ["a", "b", None], inputs))


def test_copies_carry_on() -> None:
    model, inputs = grafted("bert", gw.LoRA(r=2), gw.Bottleneck(d=3)), BY_NAME["bert"].inputs()
    gw.activate(model, gw.rows(["a", "b", None]))
    want = output(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, inputs), want)
        with torch.no_grad():
            for p in gw.adapters(other)["a"].parameters():
                p.zero_()
        assert not torch.allclose(output(other, inputs)[0], want[0], atol=1e-3)
    assert torch.equal(output(model, inputs), want)
    gw.activate(model, None)
    gw.remove(model, "a")
    gw.remove(model, "b")
    assert torch.equal(output(model, inputs), output(fresh(BY_NAME["bert"]), inputs))


def test_context_per_row() -> None:
    model, inputs = (
        grafted("llama", gw.LoReFT(r=2, positions="l1"), gw.LoReFT(r=2, positions="l1")),
        BY_NAME["llama"].inputs(),
    )
    names, lengths = ["a", "b", "a"], [3, 5, 4]
    outs = []
    for i, name in enumerate(names):
        with gw.using(model, name), gw.context(model, prompt_length=lengths[i]):
            outs.append(output(model, {k: v[i : i + 1] for k, v in inputs.items()}))
    with gw.context(model, prompt_length=lengths):
        close(together(model, names, inputs), torch.cat(outs))


def test_heads_of_one_size() -> None:
    model, inputs = grafted("bert", gw.LoRA(r=2), gw.LoRA(r=3), head=True), BY_NAME["bert"].inputs()
    close(together(model, ["a", "b", None], inputs), alone(model, ["a", "b", None], inputs))


class Flat(nn.Module):
    """Tokens are flattened to [batch * seq, d] before the site."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.site = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(self.first(x).flatten(0, 1)).unflatten(0, x.shape[:2])


def test_flattened_tokens() -> None:
    model = Flat().eval()
    for name, method in {"a": gw.LoRA(r=2, at="/site|first/"), "b": gw.DoRA(r=2, at="/site/")}.items():
        leave_init(gw.graft(model, method, name, head=False), ord(name))
    inputs = {"x": torch.randn(4, 5, 8)}
    names = ["a", None, "b", "a"]
    close(together(model, names, inputs), alone(model, names, inputs))


def test_a_mixture_of_experts_beside_its_experts() -> None:
    model, inputs = grafted("experts", gw.LoRA(r=2), gw.Bottleneck(d=3, at="attn, mlp")), BY_NAME["experts"].inputs()
    close(together(model, ["a", "b", None], inputs), alone(model, ["a", "b", None], inputs))


@pytest.mark.parametrize("method", [gw.LoRA(r=2, at="/wpe/"), gw.Full(at="/wpe/"), gw.Bottleneck(d=3, at="/wpe/")])
def test_positions_that_all_rows_share(method: Any) -> None:
    model, inputs = grafted("gpt2", method, gw.LoRA(r=3)), BY_NAME["gpt2"].inputs()
    close(together(model, ["a", "b", None], inputs), alone(model, ["a", "b", None], inputs))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[], "abc", None, 3, ["a", 5], [gw.rows(["a"])], [""], gw.A("a")])
def test_bad_rows(given: Any) -> None:
    with pytest.raises(gw.GraftError):
        gw.rows(given)


@pytest.mark.parametrize(
    ("text", "column"), [("rows()", 5), ("rows(a", 6), ("rows(a,)", 7), ("rows(rows(a))", 5), ("rows(a b)", 7)]
)
def test_bad_text(text: str, column: int) -> None:
    with pytest.raises(gw.GraftError) as caught:
        gw.parse(text)
    assert str(caught.value).splitlines()[2].index("^") - 4 == column


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "a", "b"], ["a"], ["a"] * 4, ["a", "b", "a", "b", "a", "b"]])
def test_the_wrong_number_of_names(names: list[str]) -> None:
    model = grafted("bert", gw.LoRA(r=2), gw.IA3())
    with pytest.raises(gw.GraftError, match=f"(?s)a batch of 3 and {len(names)} names"):
        together(model, names, BY_NAME["bert"].inputs())
    ids = {k: torch.cat([v, v]) for k, v in BY_NAME["bert"].inputs().items()}
    if len(names) < 4:
        with pytest.raises(gw.GraftError, match=f"(?s)a batch of 6 and {len(names)} names"):  # a multiple is no better
            together(model, names, ids)


def test_an_unknown_name() -> None:
    model = grafted("bert", gw.LoRA(r=2))
    with pytest.raises(gw.GraftError, match="'other'"):
        gw.activate(model, gw.rows(["a", "other", None]))
    assert gw.active(model) == "a"
    with pytest.raises(gw.GraftError, match="twice"):
        gw.activate(model, gw.rows(["a >> a", None, None]))


def test_another_backbones_adapter() -> None:
    one, other = grafted("bert", gw.LoRA(r=2)), grafted("llama", gw.LoRA(r=2), gw.LoRA(r=2))
    with pytest.raises(gw.GraftError, match="give a name"):
        gw.rows(["a", gw.adapters(other)["b"], None])  # type: ignore[list-item]
    with pytest.raises(gw.GraftError, match="'b'"):
        gw.activate(one, gw.rows(["a", "b", None]))


@pytest.mark.parametrize(
    ("host", "method"),
    [
        ("bert", gw.Prompt(length=2)),
        ("bert", gw.Ladder(r=3)),
        ("experts", gw.LoRA(r=2, at="expert.down")),
        ("experts", gw.LoRA(r=2, at="router")),
        ("multihead", gw.LoRA(r=2, at="q")),
    ],
)
def test_methods_that_cannot(host: str, method: Any) -> None:
    model, inputs = grafted(host, method, gw.LoRA(r=2, at="q, v | linear")), BY_NAME[host].inputs()
    before = alone(model, ["b"] * 3, inputs)
    gw.activate(model, "b")
    with pytest.raises(gw.GraftError, match=r"(?s)one adapter per row.*'a'.*gw.using") as caught:
        gw.activate(model, gw.rows(["a", "b", None]))
    assert f"{method.name} of 'a'" in str(caught.value)
    assert gw.active(model) == "b"
    close(output(model, inputs), before)


def test_dropout_in_training() -> None:
    model, inputs = grafted("bert", gw.LoRA(r=2, dropout=0.1), gw.LoRA(r=2)), BY_NAME["bert"].inputs()
    gw.activate(model, gw.rows(["a", "b", None]))
    want = alone(model, ["a", "b", None], inputs)
    close(output(model, inputs), want)
    model.train()
    with pytest.raises(gw.GraftError, match="dropout"):
        output(model, inputs)
    model.eval()
    close(output(model, inputs), want)


def test_heads_of_two_sizes() -> None:
    model = fresh(BY_NAME["bert"])
    for name, n in (("a", 2), ("b", 5)):
        gw.graft(model, [gw.LoRA(r=2), gw.Full(at="head", outputs=n)], name)
    with pytest.raises(gw.GraftError, match="different shapes"):
        gw.activate(model, gw.rows(["a", "b", "a"]))
    with pytest.raises(gw.GraftError, match="different shapes"):
        gw.activate(model, gw.rows(["b", None, "b"]))


def test_merge_is_refused() -> None:
    model = grafted("bert", gw.LoRA(r=2), gw.LoRA(r=2))
    gw.activate(model, gw.rows(["a", "b", None]))
    with pytest.raises(gw.GraftError, match="all rows"):
        gw.merge(model)


def test_a_weight_read_around_its_module() -> None:
    model = fresh(BY_NAME["linear_read"])
    for name in "ab":
        leave_init(gw.graft(model, gw.LoRA(r=2, at="/^site$/"), name, head=False), ord(name))
    with pytest.raises(gw.GraftError, match="without calling the module"):
        together(model, ["a", "b", None], BY_NAME["linear_read"].inputs())


def test_a_fused_layer_calls_its_modules() -> None:
    model, inputs = fresh(BY_NAME["encoder"]), BY_NAME["encoder"].inputs()
    for name in "ab":
        leave_init(gw.graft(model, gw.LoRA(r=2, at="up, down"), name, head=False), ord(name))
    close(together(model, ["a", "b", None], inputs), alone(model, ["a", "b", None], inputs))


class SequenceFirst(nn.Module):
    def __init__(self, contiguous: bool) -> None:
        super().__init__()
        self.first, self.site, self.contiguous = nn.Linear(8, 8), nn.Linear(8, 8), contiguous

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).transpose(0, 1)
        return self.site(h.contiguous() if self.contiguous else h).transpose(0, 1)


@pytest.mark.parametrize(
    ("batch", "seq", "contiguous"), [(4, 8, True), (4, 8, False), (4, 4, False), (4, 6, True), (6, 3, True)]
)
def test_a_batch_on_the_second_axis(batch: int, seq: int, contiguous: bool) -> None:
    model = SequenceFirst(contiguous).eval()
    for name in "ab":
        leave_init(gw.graft(model, gw.LoRA(r=2, at="/site/"), name, head=False), ord(name))
    with pytest.raises(gw.GraftError, match="axis"):
        together(model, ["a", "b"] * (batch // 2), {"x": torch.randn(batch, seq, 8)})


def test_torchs_second_axis() -> None:
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    for name in "ab":
        gw.graft(model, gw.LoRA(r=2, at="up"), name, head=False)
    with pytest.raises(gw.GraftError, match="batch_first"):
        gw.activate(model, gw.rows(["a", "b"]))


def test_many_rows_of_one_adapter_make_few_products() -> None:
    model = bert().eval()
    for name in "ab":
        gw.graft(model, gw.LoRA(r=2), name, head=False)
    gw.activate(model, gw.rows(["a"] * 8 + ["b"] * 16 + [None] * 8))
    table = root_of(model).runtime.rows
    assert table is not None and (table.given, table.rows) == (32, 4)
