"""READ (2023): the acceptance checks of the catalogue."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as T
from adapter_models import closed_form, on_meta
from attention_models import batch, decode, make, run, scatter
from torch import Tensor

import graftwork as gw
from graftwork.methods.side.forms.recurrent import Correction

pytestmark = pytest.mark.system("read")
KINDS = ["bert", "llama", "gpt2", "t5", "vit", "whisper", "torch"]


def grafted(kind: str, depth: int = 2, seed: int | None = 3, **given: Any) -> tuple[Any, Any, Correction]:
    names = {"gpt2": ["n_layer"], "t5": ["num_layers"], "whisper": ["encoder_layers", "decoder_layers"], "torch": []}
    model = make(kind, **dict.fromkeys(names.get(kind, ["num_hidden_layers"]), depth))
    adapter = gw.graft(model, gw.READ(**{"d": 6} | given), head=False, seed=0)
    if seed is not None:
        scatter(adapter, seed=seed)
    (correction,) = (d for d in adapter.deltas() if isinstance(d, Correction))
    return model.eval(), adapter, correction


def seen(correction: Correction) -> list[list[Any]]:
    """What the recurrence was given in each pass."""
    noted: list[list[Any]] = []
    inner = correction.correction

    def note(records: list[Any]) -> Tensor:
        noted.append(records)
        return inner(records)

    correction.correction = note  # type: ignore[method-assign]
    return noted


def nodes(out: Tensor) -> int:
    """Size of the autograd graph that ends in `out`."""
    found, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [below for below, _ in node.next_functions]
    return len(found)


@pytest.mark.parametrize("joiner", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_read__nothing_goes_back_through_the_backbone(kind: str, joiner: bool) -> None:
    model, adapter, correction = grafted(kind, joiner=joiner)
    records = seen(correction)
    out = run(model, batch(kind), grad=True)
    for one in records[0]:
        assert not one.h.requires_grad and one.h.grad_fn is None and not one.x.requires_grad
        assert (one.inside is not None) == joiner and (one.inside is None or not one.inside.requires_grad)
    out.square().mean().backward()
    own = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_read__the_graph_is_that_of_the_recurrence_alone(kind: str) -> None:
    """Of a model twice as deep it grows by what the cell alone takes, and wider blocks do not change it."""
    sizes, alone = {}, {}
    for depth in (2, 4, 6):
        model, _, correction = grafted(kind, depth)
        records = seen(correction)
        sizes[depth] = nodes(run(model, batch(kind), grad=True))
        alone[depth] = nodes(correction.__class__.correction(correction, records[0]))
    assert sizes[4] - alone[4] == sizes[2] - alone[2] == sizes[6] - alone[6]
    plain = make(kind, num_hidden_layers=6)
    gw.graft(plain, gw.LoRA(r=2), head=False)
    assert nodes(run(plain, batch(kind), grad=True)) > 2 * (sizes[6] - alone[6])


def test_read__activations_kept_for_the_backward_pass_are_fewer_than_those_of_lora() -> None:
    given = batch("bert", rows=8, length=24)

    def kept(method: gw.Method) -> int:
        model = make("bert", num_hidden_layers=6)
        gw.graft(model, method, head=False)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in weights:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = run(model, given, grad=True)
        return sum(storages.values()) if out.requires_grad else 0

    assert 0 < kept(gw.READ(d=6)) < 0.5 * kept(gw.LoRA(r=1, at="q"))


def test_read__count_does_not_depend_on_depth() -> None:
    for depth in (2, 24):
        model = on_meta(lambda depth=depth: T.BertModel(T.BertConfig(num_hidden_layers=depth)))
        assert closed_form(model, [gw.READ()]) == 986_112
        assert gw.graft(model, gw.READ(), head=False).num_parameters == 986_112


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "linear"])
@pytest.mark.parametrize("joiner", [False, True])
@pytest.mark.parametrize("start", ["zero", "embedding"])
@pytest.mark.parametrize("norm", [True, False])
def test_read__every_form_counts_and_trains(cell: str, joiner: bool, start: str, norm: bool) -> None:
    given: dict[str, Any] = {"cell": cell, "joiner": joiner, "start": start, "norm": norm}
    model, adapter, _ = grafted("bert", **given)
    assert adapter.num_parameters == closed_form(make("bert"), [gw.READ(d=6, **given)])
    run(model, batch("bert"), grad=True).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_read__without_an_output_it_is_the_backbone(kind: str) -> None:
    model, _, correction = grafted(kind)
    given = batch(kind)
    with gw.using(model, None):
        plain = run(model.train() if kind == "torch" else model, given)
    model.eval()
    assert (run(model, given) - plain).abs().max() > 1e-3
    correction.out.weight.data.zero_()
    correction.out.bias.data.zero_()
    torch.testing.assert_close(run(model, given), plain, atol=0 if kind != "torch" else 1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_read__a_linear_cell_is_a_sum_of_projected_states(kind: str) -> None:
    model, _, correction = grafted(kind, 3, cell="linear", agg="last", norm=False, s_in=0.7, s_out=1.3)
    records, given = seen(correction), batch(kind)
    out = run(model, given)
    states = [one.h for one in records[0]]
    total = sum(0.7 * phi @ correction.down.T for phi in states)
    change = 1.3 * (total @ correction.out.weight.T + correction.out.bias)
    if kind == "bert":  # the stack ends in its last block
        torch.testing.assert_close(out, states[-1] + change)
        return
    with gw.using(model, None), torch.no_grad():
        torch.testing.assert_close(out, model.lm_head(model.model.norm(states[-1] + change)))


def test_read__a_gru_is_torch_s() -> None:
    model, _, correction = grafted("bert", 3)
    records = seen(correction)
    out = run(model, batch("bert"))
    gru = torch.nn.GRU(32, 6)
    gru.weight_ih_l0.data, gru.weight_hh_l0.data = correction.cell_in.data, correction.cell_state.data
    gru.bias_ih_l0.data, gru.bias_hh_l0.data = correction.cell_in_bias.data, correction.cell_state_bias.data
    phi = torch.stack([one.h for one in records[0]]).flatten(1, 2)
    x = phi * torch.rsqrt(phi.square().mean(-1, keepdim=True) + 1e-6) * correction.gain
    change = correction.out(gru(x)[0].mean(0)).view(2, 6, 32)
    torch.testing.assert_close(out, records[0][-1].h + change)


@pytest.mark.parametrize("joiner", [False, True])
def test_read__tokens_see_each_other_with_a_joiner_only(joiner: bool) -> None:
    model, _, correction = grafted("bert", joiner=joiner)
    records = seen(correction)
    run(model, batch("bert", pad=0))
    moved = copy.copy(records[0])
    other = moved[0].h.clone()
    other[:, 3] += 1.0
    moved[0] = type(moved[0])(moved[0].step, moved[0].name, moved[0].x, other, moved[0].given, moved[0].inside)
    compute = correction.__class__.correction
    with torch.no_grad():
        change = (compute(correction, moved) - compute(correction, records[0])).abs().amax((0, 2))
    assert change[3] > 1e-4
    assert bool((change[[0, 1, 2, 4, 5]] > 1e-6).all()) == joiner
    assert joiner or not change[[0, 1, 2, 4, 5]].any()


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_read__the_joiner_has_the_backbone_s_maps(kind: str) -> None:
    model, _, correction = grafted(kind, joiner=True)
    records, given = seen(correction), batch(kind)
    run(model, given)
    eager = make(kind)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(**given, output_attentions=True)
    maps = out.decoder_attentions if kind == "t5" else out.attentions
    real = torch.ones(2, maps[0].shape[-1], dtype=torch.bool) if kind == "t5" else given["attention_mask"].bool()
    for one, expected in zip(records[0], maps, strict=True):
        torch.testing.assert_close(one.inside[real], expected.mean(1)[real], atol=1e-5, rtol=1e-4)


def test_read__generation_with_a_cache() -> None:
    model, _, _ = grafted("llama")
    given = batch("llama")
    torch.testing.assert_close(decode(model, given), decode(model, given, use_cache=False), atol=1e-4, rtol=1e-4)
    model, _, _ = grafted("llama", joiner=True)
    decode(model, given, use_cache=False)
    with pytest.raises(gw.GraftError, match="cache"):
        decode(model, given)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("bert", {"at": "block"}, "no top"),
        ("bert", {"at": "q, top"}, "not a block"),
        ("bert", {"at": "block, top", "joiner": True}, "self-attention"),
        ("bert", {"cell": "tree"}, "one of"),
        ("swin", {}, "one width"),
    ],
)
def test_read__what_cannot_be_is_refused_by_name(kind: str, options: dict[str, Any], words: str) -> None:
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32}
    model = T.SwinModel(T.SwinConfig(**sizes)) if kind == "swin" else make(kind)
    with pytest.raises(gw.GraftError, match=words):
        gw.graft(model, gw.READ(**options), head=False)
    assert not any("graft" in name for name, _ in model.named_modules())
