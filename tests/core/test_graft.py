"""The verbs: what they do to a model, and that what they refuse leaves it as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.core.errors import GraftError


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def bert(labels: int = 2):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        num_labels=labels,
    )
    return BertForSequenceClassification(config).eval()


def state(model: nn.Module):
    """All that a refused call must not change."""
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    return (
        tensors,
        [type(m) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        list(gw.adapters(model)),
    )


def assert_same(model: nn.Module, before) -> None:
    after = state(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1:] == after[1:]


def spread(adapter) -> None:
    """Leave the initial values."""
    generator = torch.Generator().manual_seed(1)
    for p in adapter.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)


REFUSED = {
    "no such role": (lambda m: gw.graft(m, gw.LoRA(at="linear | qq")), ["qq"]),
    "no such pattern": (lambda m: gw.graft(m, gw.LoRA(at="/nothing/")), ["nothing"]),
    "one typo of two": (lambda m: gw.graft(m, gw.LoRA(at="linear, embbed")), ["embbed"]),
    "no method": (lambda m: gw.graft(m, []), ["no method"]),
    "not a method": (lambda m: gw.graft(m, [3]), ["3"]),
    "unknown method": (lambda m: gw.graft(m, "lorra"), ["lorra", "lora"]),
    "no name": (lambda m: gw.graft(m, gw.LoRA(), name=""), ["not a name"]),
    "a name that exists": (lambda m: gw.graft(m, gw.LoRA(), name="one"), ["one", "gw.remove"]),
    "unknown adapter": (lambda m: gw.activate(m, "two"), ["'two'", "one"]),
    "unknown adapter in an expression": (lambda m: gw.activate(m, "one >> ones"), ["'ones'", "did you mean 'one'"]),
    "an adapter twice": (lambda m: gw.activate(m, "one >> one"), ["twice"]),
    "not an expression": (lambda m: gw.activate(m, 3), ["3"]),
    "remove an unknown one": (lambda m: gw.remove(m, "two"), ["'two'"]),
    "unmerge what is not merged": (lambda m: gw.unmerge(m), ["nothing is merged"]),
    "no norm here": (lambda m: gw.graft(m, gw.Bottleneck(position="before", at="linear")), ["norm"]),
    "layers out of range": (lambda m: gw.graft(m, gw.LoRA(layers="7"), name="two"), ["7"]),
    "a matrix is needed": (lambda m: gw.graft(bert(), gw.LoRA(at="norm")), ["matrix"]),
    "progress out of range": (lambda m: gw.step(m, 1.5), ["1.5"]),
    "nothing to calibrate": (lambda m: gw.calibrate(m, []), ["calibration"]),
    "head where there is none": (lambda m: gw.graft(m[0], gw.LoRA(), head=True), [""]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case: str) -> None:
    call, words = REFUSED[case]
    model = mlp()
    gw.graft(model, gw.LoRA(r=2), name="one")
    before = state(model)
    with pytest.raises(GraftError) as caught:
        call(model)
    for word in words:
        assert word in str(caught.value)
    assert_same(model, before)


def test_a_refused_first_graft_leaves_a_bare_model() -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(GraftError):
        gw.graft(model, [gw.LoRA(r=2), gw.LoRA(at="nothing")])
    assert_same(model, before)
    assert "graft" not in dict(model.named_children())
    with pytest.raises(GraftError, match="nothing is grafted"):
        gw.activate(model, "one")


def test_a_merge_that_cannot_be_changes_nothing() -> None:
    model = mlp()
    gw.graft(model, [gw.LoRA(r=2), gw.Bottleneck(d=2)], name="both")
    before = state(model)
    with pytest.raises(GraftError, match="bottleneck"):
        gw.merge(model)
    assert_same(model, before)


@pytest.mark.parametrize("mixture", ["split(a=2)", "route(a, b, by=uniform)", "0.5*split(a=2) + b", "f"])
def test_a_mixture_has_no_one_weight_to_merge(mixture: str) -> None:
    model = mlp()
    for name in "ab":
        gw.graft(model, gw.LoRA(r=2), name=name, head=False)
    gw.graft(model, gw.Weighted(of=("a", "b")), name="f", head=False)
    gw.activate(model, mixture)
    before = state(model)
    with pytest.raises(GraftError, match="the same for all tokens"):
        gw.merge(model)
    assert_same(model, before)
    gw.activate(model, "0.5*a + b")
    gw.merge(model)


def test_grafting_inside_a_grafted_model_is_refused() -> None:
    model = mlp()
    gw.graft(model, gw.LoRA(r=2))
    with pytest.raises(GraftError, match="outermost"):
        gw.graft(nn.Sequential(model, nn.ReLU()), gw.LoRA(r=2))


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    model = mlp()
    model[0].forward = lambda x: x
    with pytest.raises(GraftError, match="replaced on the instance"):
        gw.graft(model, gw.LoRA(r=2))


def test_an_attribute_of_that_name_is_refused() -> None:
    model = mlp()
    model[0].graft = nn.ReLU()
    with pytest.raises(GraftError, match="'graft'"):
        gw.graft(model, gw.LoRA(r=2))


def test_removing_the_last_adapter_restores_the_model() -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    ids = torch.randint(0, 50, (2, 5))
    before, out = state(model), model(ids).logits
    for name, method in (("a", gw.LoRA(r=2)), ("b", gw.Bottleneck(d=2))):
        spread(gw.graft(model, method, name=name))
    assert not torch.equal(model(ids).logits, out)
    gw.remove(model, "b")
    gw.remove(model, "a")
    assert_same(model, before)
    assert torch.equal(model(ids).logits, out)


def test_activation_runs_the_backbones_own_code() -> None:
    model = bert()
    adapter = gw.graft(model, gw.LoRA(r=2))
    assert {type(m).__mro__[1].__name__ for m in model.modules()} >= {"Grafted"}
    gw.activate(model, None)
    assert not any("Grafted" in [c.__name__ for c in type(m).__mro__] for m in model.modules())
    assert not any(p.requires_grad for p in adapter.parameters())
    gw.activate(model, "default")
    assert all(p.requires_grad for p in adapter.parameters())


def test_names_are_data() -> None:
    model, ids = bert(), torch.randint(0, 50, (2, 5))
    outs = {}
    for name in ("default", "1", "a.b", "weight", "x >> y", "über/..", "forward"):
        spread(gw.graft(model, gw.LoRA(r=2), name=name, seed=len(outs)))
        outs[name] = model(ids).logits
    for name, out in outs.items():
        gw.activate(model, name)
        assert torch.equal(model(ids).logits, out)
    gw.activate(model, '"a.b" >> 1')
    gw.remove(model, "1")
    gw.activate(model, "a.b")
    assert torch.equal(model(ids).logits, outs["a.b"])
    assert len(gw.adapters(model)) == len(outs) - 1


def test_a_stack_applies_both() -> None:
    model, x = mlp(), torch.randn(4, 6)
    a = gw.graft(model, gw.LoRA(r=2), name="a", head=False)
    b = gw.graft(model, gw.LoRA(r=3), name="b", head=False)
    spread(a)
    spread(b)
    gw.activate(model, "a >> b")
    both = model(x)
    gw.merge(model)
    torch.testing.assert_close(model(x), both)
    w = model[0].weight.clone()
    gw.unmerge(model)
    d = {n: next(iter(ad.parts[0].deltas.values())) for n, ad in gw.adapters(model).items()}
    torch.testing.assert_close(w, model[0]._parameters["weight"] + sum(v.scale * v.up @ v.down for v in d.values()))


def test_merged_blocks_other_verbs_until_unmerged() -> None:
    model = mlp()
    gw.graft(model, gw.LoRA(r=2), name="a")
    gw.merge(model)
    for call in (lambda: gw.merge(model), lambda: gw.activate(model, "a"), lambda: gw.remove(model, "a")):
        with pytest.raises(GraftError, match="merged"):
            call()
    gw.unmerge(model)
    gw.remove(model, "a")


def test_forget_leaves_a_plain_model() -> None:
    model, x = mlp(), torch.randn(4, 6)
    spread(gw.graft(model, gw.LoRA(r=2)))
    out = model(x)
    gw.merge(model)
    gw.forget(model)
    torch.testing.assert_close(model(x), out)
    assert state(model)[0].keys() == state(mlp())[0].keys()


def test_heads_of_different_sizes_live_on_one_backbone() -> None:
    model, ids = bert(labels=2), torch.randint(0, 50, (3, 5))
    base = model(ids).logits
    two = gw.graft(model, gw.LoRA(r=2), name="two")
    assert any(m.name == "full" for m in two.methods)
    five = gw.graft(model, [gw.LoRA(r=2), gw.Full(at="head", outputs=5)], name="five")
    five.labels = tuple("abcde")
    gw.activate(model, "five")
    out = model(ids, labels=torch.tensor([0, 4, 3]))
    assert out.logits.shape == (3, 5) and out.loss.isfinite()
    assert model.config.num_labels == model.num_labels == 5 and model.config.id2label[4] == "e"
    gw.activate(model, "two")
    assert model(ids).logits.shape == (3, 2)
    assert model.config.num_labels == model.num_labels == 2
    gw.activate(model, None)
    assert torch.equal(model(ids).logits, base)


def test_the_head_is_said_and_can_be_left_out() -> None:
    model = bert()
    gw.graft(model, gw.LoRA(r=2), name="with")
    assert "the task head" in str(gw.summary(model))
    gw.graft(model, gw.LoRA(r=2), name="without", head=False)
    assert [m.name for m in gw.adapters(model)["without"].methods] == ["lora"]


def test_seeds_decide_and_leave_the_global_generator_alone() -> None:
    one, two, other = mlp(), mlp(), mlp()
    before = torch.get_rng_state()
    a, b, c = (gw.graft(m, gw.LoRA(r=2), seed=s) for m, s in ((one, 5), (two, 5), (other, 6)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.state_dict().values(), c.state_dict().values(), strict=True))


def test_using_restores_what_was_active_even_after_an_error() -> None:
    model = mlp()
    gw.graft(model, gw.LoRA(r=2), name="a")
    with pytest.raises(ZeroDivisionError), gw.using(model, None):
        assert gw.active(model) is None
        raise ZeroDivisionError
    assert gw.active(model) == "a"


def test_context_holds_for_its_block() -> None:
    model = mlp()
    delta = next(gw.graft(model, gw.LoRA(r=2)).deltas())
    with gw.context(model, task="mnli"):
        assert delta.context("task") == "mnli"
        assert copy.deepcopy(model)[0]._armed.runtime.context == {"task": "mnli"}
    assert delta.context("task") is None


def test_a_schedule_that_is_never_stepped_warns_once() -> None:
    model = mlp()
    adapter = gw.graft(model, gw.AdaLoRA(init_r=4, target_r=2), head=False)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)

    def run(step: bool) -> None:
        for _ in range(4):
            model(torch.randn(2, 6)).sum().backward()
            optimiser.step()
            if step:
                gw.step(model, 0.5)
            optimiser.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(step=True)
    with pytest.warns(UserWarning, match=r"gw\.step") as caught:
        run(step=False)
    assert len(caught) == 1


def test_running_statistics_stay_the_backbones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 2)
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = gw.graft(model, [gw.LoRA(r=2, at="conv"), gw.Full(at="norm")], head=False)
    model.train()
    x = torch.randn(8, 3, 6, 6)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        model(x).sum().backward()
        optimiser.step()
    assert model[1].training is False and model[0].training  # it normalises by the backbone's statistics
    gw.remove(model, "default")
    assert model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class ReadsAround(nn.Module):
    """Reads a weight without calling the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.first(x), self.read.weight)


def test_an_activation_adapter_on_a_module_that_is_never_called_warns() -> None:
    model, x = ReadsAround(), torch.randn(2, 6)
    gw.graft(model, gw.Bottleneck(d=2, at="/read/"), name="a", head=False)
    with pytest.warns(UserWarning, match=r"no effect.*read"):
        model(x)
    gw.graft(model, gw.LoRA(r=2, at="/read/"), name="b", head=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(x)


def test_a_weight_that_changed_its_size_under_an_adapter_says_so() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    gw.graft(model, gw.LoRA(r=2, at="/0/"), head=False)
    model[0].weight.data = torch.ones(9, 4)  # what resize_token_embeddings does
    with pytest.raises(GraftError, match=r"\[9, 4\] now, \[7, 4\] when it was grafted"):
        model(torch.tensor([1]))
    gw.remove(model, "default")
    assert model(torch.tensor([8])).shape == (1, 3)


def test_a_forward_that_somebody_kept_is_the_bare_one_while_nothing_is_active() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3))
    x = torch.randn(2, 3)
    bare = model(x)
    for p in gw.graft(model, gw.LoRA(r=2, at="linear"), "a", head=False).parameters():
        nn.init.normal_(p)
    kept, adapted = model.forward, model(x)
    inner = model[0].forward
    assert torch.equal(kept(x), adapted) and not torch.equal(adapted, bare)
    with gw.using(model, None):
        assert torch.equal(kept(x), bare) and torch.equal(inner(x), bare)
    assert torch.equal(kept(x), adapted)


def test_a_host_that_is_wrapped_or_replaced() -> None:
    """A part that is wrapped (compiled) is still called; one that is replaced is refused with its adapter inside."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(2, 4)
    adapter = gw.graft(model, gw.LoRA(r=2, at="/^0$/"), head=False)
    next(adapter.deltas()).up.data.normal_()
    before = model(x)
    model[0] = Wrapper(model[0])
    assert torch.equal(model(x), before) and torch.equal(model(x), before)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    gw.graft(model, gw.LoRA(r=2, at="/^0$/"), head=False)
    model[0] = nn.Linear(4, 4)
    for _ in range(2):
        with pytest.raises(GraftError, match="'0' was replaced"):
            model(x)
