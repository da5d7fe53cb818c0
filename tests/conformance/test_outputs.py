"""What the grafted model computes: identity at init, modes, several adapters, generation, compilation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import graftwork as gw

from .cases import Snapshot, calibrate, close, dear, every, first, gradients, grafted, leave_init, loss, on, where
from .hosts import BY_NAME, forward, fresh, output
from .settings import CASES, Case

GENERATING = ("llama", "gpt2", "t5")


@every
def test_identity_at_init(case: Case):
    """Where the table says so, and only where it does."""
    inputs = case.host.inputs()
    base = output(fresh(case.host), inputs)
    model, _ = grafted(case, noise=False)
    expected = case.setting.identity
    assert expected is None or case.method.identity is expected
    if case.method.identity:
        if case.setting.exact:
            assert torch.equal(output(model, inputs), base)
        else:
            close(output(model, inputs), base)


@every
def test_away_from_init_it_acts_the_same_in_both_modes(case: Case):
    """Also guards the fused paths that are taken in evaluation only."""
    inputs = case.host.inputs()
    model, _ = grafted(case)
    acting = output(model, inputs)
    assert (acting - output(fresh(case.host), inputs)).abs().max() > 1e-4
    close(forward(model, inputs), acting)
    torch.manual_seed(0)  # where layers are dropped in training, a draw that drops none
    close(output(model.train(), inputs), acting)


@where(
    lambda case: (
        any(f.name == "dropout" for f in dataclasses.fields(case.method))
        and case.host.name in ("linear_square", "bert")
    )
)
def test_dropout_acts_in_training_on_the_edit_only(case: Case):
    method = dataclasses.replace(case.method, dropout=0.5)
    inputs = {k: v[:1].repeat(4, *[1] * (v.dim() - 1)) for k, v in case.host.inputs().items()}
    model = fresh(case.host)
    base = output(model, inputs)
    adapter = gw.graft(model, method, "a", head=False, seed=0)
    if method.identity and case.setting.exact:
        assert torch.equal(output(model.train(), inputs), base)
    calibrate(model.eval(), case)
    leave_init(adapter)
    out = output(model.train(), inputs)
    assert not torch.equal(out[0], out[1]), "one mask is shared by the whole batch"
    assert not torch.equal(output(model, inputs), out), "the mask never changes"
    plain, _ = grafted(case)
    assert torch.equal(output(model.eval(), inputs), output(plain, inputs))


@on("bert", "llama", "gpt2", "t5", "vit", "encoder", "packed_qkv")
def test_each_site_acts_by_itself(case: Case):
    """Every delta changes the output, and no two do the same: none is bound to another's module."""
    inputs = case.host.inputs()
    model, adapter = grafted(case)
    full = output(model, inputs)
    seen = []
    for delta in adapter.deltas():
        before = [p.detach().clone() for p in delta.parameters()]
        if not before or delta.pruned == sum(p.numel() for p in before):  # nothing of it, or in its place, acts
            continue
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(torch.linspace(0.03, 0.07, p.numel()).view_as(p))  # not all alike: a softmax would not see it
        out = output(model, inputs)
        assert not torch.equal(out, full), delta.key
        seen.append(out)
        with torch.no_grad():
            for p, old in zip(delta.parameters(), before, strict=True):
                p.copy_(old)
    assert len({out.numpy(force=True).tobytes() for out in seen}) == len(seen)
    assert torch.equal(output(model, inputs), full)


@first
def test_two_adapters_live_side_by_side(case: Case):
    inputs = case.host.inputs()
    model, one = grafted(case, "one")
    base = output(fresh(case.host), inputs)
    first = output(model, inputs)
    two = gw.graft(model, case.method, "two", head=False, seed=1)
    leave_init(two, seed=2)
    second = output(model, inputs)
    assert not torch.equal(first, second)
    assert {p.requires_grad for p in one.parameters()} == {False}
    assert {p.requires_grad for p in two.parameters()} == {True}
    gw.activate(model, "one")
    assert torch.equal(output(model, inputs), first)
    gw.activate(model, None)
    assert torch.equal(output(model, inputs), base)
    with gw.using(model, "two"):
        assert torch.equal(output(model, inputs), second)
    assert torch.equal(output(model, inputs), base)
    gw.activate(model, "one >> two")
    assert torch.isfinite(output(model, inputs)).all()
    gw.remove(model, "two")
    gw.activate(model, "one")
    assert torch.equal(output(model, inputs), first)
    gw.remove(model, "one")
    Snapshot(fresh(case.host)).same_bits(model)


@on(*GENERATING)
def test_generate_with_and_without_the_cache_agrees(case: Case):
    model, _ = grafted(case)
    ids = torch.tensor([[0, 0, 9, 17, 5], [8, 30, 22, 6, 40]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}  # left padding
    gw.context(model, prompt_length=torch.tensor([3, 5]))  # for methods that edit positions of the prompt
    given = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    if not case.setting.caches:
        with pytest.raises(gw.GraftError, match="cache"):
            model.generate(**inputs, **given, use_cache=True)
        assert len(model.generate(**inputs, **given, use_cache=False).sequences) == 2
        return
    cached = model.generate(**inputs, **given, use_cache=True)
    plain = model.generate(**inputs, **given, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    close(torch.stack(cached.logits), torch.stack(plain.logits), 1e-4)
    base = fresh(case.host).generate(**inputs, **given)
    assert not torch.allclose(torch.stack(base.logits), torch.stack(cached.logits), atol=1e-5)


@dear("linear_wide", "llama", "encoder")
def test_compile_fullgraph_equals_eager(case: Case):
    torch.compiler.reset()
    inputs = case.host.inputs()
    model, _adapter = grafted(case)
    eager = output(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(output(compiled, inputs), eager)


@dear("linear_wide")
def test_compiled_training_gives_the_same_gradients(case: Case):
    torch.compiler.reset()
    inputs = case.host.inputs()
    model, adapter = grafted(case)
    model.train()
    loss(model, inputs).backward()
    eager = gradients(adapter)
    for p in adapter.parameters():
        p.grad = None
    loss(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs).backward()
    compiled = gradients(adapter)
    assert compiled.keys() == eager.keys() != set()
    for name, grad in compiled.items():
        close(grad, eager[name], 1e-4)


@pytest.mark.parametrize("name", sorted({case.name for case in CASES}))
def test_plain_models_keep_their_output_layer(name: str):
    """On a model that is nothing but layers, the last one is the head: default sites leave it alone."""
    model = fresh(BY_NAME["linear_square"])
    method = next(case for case in CASES if case.name == name).method
    method = type(method)()
    try:
        adapter = gw.graft(model, method, head=False)
    except gw.GraftError as error:
        assert "found:" in str(error)
        return
    touched = {site.path for site in adapter.sites if site.role != "head"}
    assert "last" not in touched
