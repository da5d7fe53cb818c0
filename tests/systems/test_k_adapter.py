"""Wang et al. 2021: K-Adapter, the acceptance checks of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from adapter_models import closed_form, on_meta
from attention_models import batch, decode, make, run, scatter
from torch import Tensor

import graftwork as gw
from graftwork.methods.side.forms.knowledge import Features, Knowledge, Layer

pytestmark = pytest.mark.system("k-adapter")
SMALL = {"states": "0,1,-1", "d": 8, "depth": 2, "heads": 2, "d_ff": 16}


def grafted(kind: str, name: str = "a", model: Any = None, seed: int = 3, **given: Any) -> tuple[Any, Any]:
    depth = {"gpt2": "n_layer", "t5": "num_layers"}.get(kind, "num_hidden_layers")
    model = make(kind, **{depth: 4}) if model is None else model
    adapter = gw.graft(model, gw.KAdapter(**SMALL | given), name, head=False, seed=0)
    scatter(adapter, seed=seed)
    return model.eval(), adapter


def states(model: Any, given: dict[str, Any]) -> tuple[Tensor, ...]:
    with gw.using(model, None), torch.no_grad():
        return model(**given, output_hidden_states=True).hidden_states  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2", "t5", "vit"])
def test_k_adapter__nothing_goes_back_through_the_backbone(kind: str) -> None:
    """A backbone that is run without a graph gives the same gradients, and none of its activations is kept."""
    model, adapter = grafted(kind)
    given = batch(kind)
    before = {n: p.clone() for n, p in model.named_parameters() if "graft" not in n}
    entered: list[Tensor] = []
    for delta in adapter.deltas():
        for module in (m for m in (getattr(delta, "down", None), getattr(delta, "dense", None)) if m is not None):
            module.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    out = run(model, given, grad=True)
    first = entered[0]
    assert first.grad_fn is None and not first.requires_grad
    out.square().mean().backward()
    optimizer = torch.optim.SGD(list(adapter.parameters()), lr=0.1)
    grads = [p.grad.clone() for p in adapter.parameters()]
    assert all(g.any() for g in grads)
    optimizer.step()
    own = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in before.items())


def test_k_adapter__gradients_are_those_over_cached_states() -> None:
    model, adapter = grafted("bert")
    given = batch("bert", side="right")
    hidden = states(model, given)
    run(model, given, grad=True).square().mean().backward()
    grads = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    *steps, end = adapter.deltas()
    out: Any = 0
    for step, at in zip(steps, (0, 1, 3), strict=True):
        step.runtime.mask = given["attention_mask"]
        out = step.know(hidden[at].detach() + out, {})
    end.dense(torch.cat([hidden[-1].detach(), out], -1)).square().mean().backward()
    for p, g in zip(adapter.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_k_adapter__activations_kept_for_the_backward_pass_are_its_own() -> None:
    """Ten more blocks under the same three states keep nothing more."""
    given = batch("bert", rows=8, length=24)

    def kept(depth: int) -> int:
        model = make("bert", num_hidden_layers=depth)
        gw.graft(model, gw.KAdapter(**SMALL), head=False)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}
        held = []

        def note(t: Tensor) -> Tensor:
            held.append(t)  # so that no storage is used twice
            if t.untyped_storage().data_ptr() not in weights:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            run(model, given, grad=True)
        return sum(storages.values())

    assert kept(14) == kept(4) > 0


def test_k_adapter__adapters_do_not_see_each_other() -> None:
    model, _ = grafted("bert", "a")
    given = batch("bert")
    a = run(model, given)
    grafted("bert", "b", model, seed=4)
    b = run(model, given)
    assert not torch.equal(a, b)
    gw.activate(model, "a | b")
    with torch.no_grad():
        both = model(**given)
    assert torch.equal(both["a"][0], a) and torch.equal(both["b"][0], b)
    gw.activate(model, "a")
    gw.remove(model, "b")
    assert torch.equal(run(model, given), a)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_k_adapter__without_projections_each_layer_is_the_identity(kind: str) -> None:
    model, adapter = grafted(kind)
    given = batch(kind, pad=0)
    hidden = states(model, given)
    features: list[Tensor] = []
    for delta in adapter.deltas():
        if isinstance(delta, Knowledge):
            for line in (delta.down, delta.up):
                line.weight.data.zero_()
                line.bias.data.zero_()
        if isinstance(delta, Features):
            delta.dense.register_forward_pre_hook(lambda m, args: features.append(args[0]))
    run(model, given)
    last, out = features[0].chunk(2, -1)
    torch.testing.assert_close(out, hidden[0] + hidden[1] + hidden[3])
    torch.testing.assert_close(last, hidden[-1])


def test_k_adapter__a_layer_is_bert_s() -> None:
    config = T.BertConfig(
        hidden_size=24, num_attention_heads=4, intermediate_size=32, layer_norm_eps=1e-5, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs, ours = T.models.bert.modeling_bert.BertLayer(config), Layer(24, 4, 32, 0.0, torch.zeros(()))
    for p in ours.parameters():
        p.data.normal_(0.0, 0.3)
    inside, names = theirs.attention.self, ("query", "key", "value")
    for name, w, b in zip(names, ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3), strict=True):
        getattr(inside, name).weight.data, getattr(inside, name).bias.data = w.detach(), b.detach()
    pairs = [(theirs.attention.output.dense, ours.out), (theirs.intermediate.dense, ours.up)]
    for module, line in [*pairs, (theirs.output.dense, ours.down)]:
        module.weight.data, module.bias.data = line.weight.data, line.bias.data
    for i, norm in enumerate((theirs.attention.output.LayerNorm, theirs.output.LayerNorm)):
        norm.weight.data, norm.bias.data = ours.gains[i].data, ours.shifts[i].data
    x = torch.randn(2, 5, 24)
    out = theirs(x)
    torch.testing.assert_close(ours(x, None), out if isinstance(out, Tensor) else out[0])


def test_k_adapter__counts_of_roberta_large() -> None:
    config = T.RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    model = on_meta(lambda: T.RobertaModel(config))
    method = gw.KAdapter()
    adapter = gw.graft(model, method, head=False)
    layers = [d for d in adapter.deltas() if isinstance(d, Knowledge)]
    assert [int(d.key.split(".")[2].split(":")[0]) for d in layers] == [0, 11, 23]
    assert sum(p.numel() for d in layers for p in d.layers.parameters()) == 3 * 14_175_744 == 42_527_232
    assert sum(p.numel() for d in layers for p in d.parameters()) == 47_251_200
    assert adapter.num_parameters == closed_form(model, [method]) == 47_251_200 + 2 * 1024**2 + 1024


def test_k_adapter__padding_is_not_seen() -> None:
    model, _ = grafted("bert")
    given = batch("bert", pad=2, side="right")
    short = {key: value[1:, :-2] for key, value in given.items()}
    torch.testing.assert_close(run(model, given)[1:, :-2], run(model, short), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "openai-gpt", "codegen"])
def test_k_adapter__a_causal_stack_stays_causal(kind: str) -> None:
    """By a flag of its attention, by the mask its blocks are given, or by one they keep."""
    sizes: dict[str, Any] = {"vocab_size": 99, "n_layer": 4, "n_head": 4, "pad_token_id": 0}
    width = {"hidden_size": 32} if kind == "bloom" else {"n_embd": 32, "n_positions": 32, "rotary_dim": 4}
    torch.manual_seed(0)
    other = kind not in ("llama", "gpt2")
    model = T.AutoModelForCausalLM.from_config(T.CONFIG_MAPPING[kind](**sizes | width)) if other else None
    model, _ = grafted(kind, model=model)
    given = batch("llama", pad=0)
    before = run(model, given)
    given["input_ids"][:, -1] = 50
    after = run(model, given)
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1])


def test_k_adapter__generates_without_a_cache() -> None:
    model, _ = grafted("llama")
    assert decode(model, batch("llama"), use_cache=False).shape[0] == 6
    with pytest.raises(gw.GraftError, match="cache"):
        decode(model, batch("llama"))


def test_k_adapter__may_start_as_the_backbone() -> None:
    model = make("bert", num_hidden_layers=4)
    plain = run(model, batch("bert"))
    gw.graft(model, gw.KAdapter(**SMALL, start="identity"), head=False)
    torch.testing.assert_close(run(model, batch("bert")), plain)
    gw.graft(model, gw.KAdapter(**SMALL), "other", head=False)  # and with another W_c it does not
    assert not torch.allclose(run(model, batch("bert")), plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "none of them in 11"),
        ({"states": "first"}, "neither a number"),
        ({**SMALL, "heads": 3}, "3 heads"),
        ({**SMALL, "at": "block"}, "no top"),
        ({**SMALL, "at": "attn, top"}, "not a block"),
    ],
)
def test_k_adapter__what_cannot_be_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    model = make("bert")
    with pytest.raises(gw.GraftError, match=words):
        gw.graft(model, gw.KAdapter(**options), head=False)
    assert not any("graft" in name for name, _ in model.named_modules())
