"""Merging, and everybody who reads or writes the weights of a grafted model by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.core.delta import WeightDelta

from .cases import Snapshot, close, grafted, is_base, leave_init, on, where
from .hosts import BY_NAME, fresh, output
from .settings import Case


def merges(case: Case) -> bool:
    return case.method.mergeable


@where(merges)
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(case: Case):
    inputs = case.host.inputs()
    model, _adapter = grafted(case)
    before = Snapshot(model)
    unmerged = output(model, inputs)
    gw.merge(model)
    close(output(model, inputs), unmerged, case.setting.merging)
    assert not torch.allclose(output(fresh(case.host), inputs), output(model, inputs), atol=1e-5)
    assert {k: type(m) for k, m in model.named_modules() if is_base(k)} == Snapshot(fresh(case.host)).classes
    with pytest.raises(gw.GraftError, match="merged"):
        gw.merge(model)
    with pytest.raises(gw.GraftError, match="unmerge"):
        gw.activate(model, "a")
    gw.unmerge(model)
    before.same(model)
    assert torch.equal(output(model, inputs), unmerged)


@where(merges, pytest.mark.slow)
def test_ten_merges_in_bfloat16_do_not_drift(case: Case):
    model, _ = grafted(case, model=fresh(case.host).bfloat16())
    before = Snapshot(model)
    for _ in range(10):
        gw.merge(model)
        gw.unmerge(model)
    before.same(model)


@where(merges, pytest.mark.slow)
def test_merged_for_good_is_a_plain_model(case: Case):
    inputs = case.host.inputs()
    model, _ = grafted(case)
    unmerged = output(model, inputs)
    gw.merge(model)
    gw.forget(model)
    close(output(model, inputs), unmerged, case.setting.merging)
    assert all(is_base(name) for name, _ in model.named_modules())
    now, before = model.state_dict().keys(), fresh(case.host).state_dict().keys()
    assert before <= now
    assert all(case.setting.adds_biases and name.endswith("bias") for name in now - before)
    assert gw.adapters(model) == {}


@where(lambda case: not merges(case))
def test_what_cannot_be_merged_is_refused(case: Case):
    model, _ = grafted(case)
    before = Snapshot(model)
    with pytest.raises(gw.GraftError, match="merge"):
        gw.merge(model)
    before.same(model)


@where(lambda case: merges(case) and case.host.name == "linear_read")
def test_reading_the_weight_around_the_module_sees_the_adapter(case: Case):
    inputs = case.host.inputs()
    reader, _ = grafted(case)
    module = fresh(case.host)
    caller = gw_caller(module)
    grafted(case, model=caller)
    close(output(reader, inputs), output(caller, inputs))
    assert not torch.allclose(output(reader, inputs), output(fresh(case.host), inputs), atol=1e-4)


def gw_caller(reader: nn.Module) -> nn.Module:
    """The same modules, called as modules are."""
    from .hosts import Net

    return Net(reader.first, reader.site, reader.last)


@on("encoder")
def test_the_fused_encoder_path_sees_the_adapter(case: Case):
    """nn.TransformerEncoder in evaluation computes whole layers from their weights (there peft returns the base)."""
    inputs = case.host.inputs()
    model, _ = grafted(case)
    torch.manual_seed(0)  # where layers are dropped in training, a draw that drops none
    slow = output(model.train(), inputs)
    model.eval()
    assert torch.backends.mha.get_fastpath_enabled()
    close(output(model, inputs), slow)
    assert (output(model, inputs) - output(fresh(case.host), inputs)).abs().max() > 1e-4


@where(merges)
def test_outside_a_pass_names_give_the_plain_parameters(case: Case):
    """FSDP, state dicts and optimisers read parameters by name."""
    model, adapter = grafted(case)
    output(model, case.host.inputs())
    plain = dict(fresh(case.host).named_parameters())
    for name, value in plain.items():
        holder, _, leaf = name.rpartition(".")
        found = getattr(model.get_submodule(holder), leaf)
        assert isinstance(found, nn.Parameter) and torch.equal(found, value), name
        assert found is model.get_submodule(holder)._parameters[leaf]
    assert plain.keys() <= dict(model.named_parameters()).keys()
    assert isinstance(next(adapter.deltas()), WeightDelta)


@where(lambda case: merges(case) and case.host.name in ("linear_square", "conv1d", "conv2d", "embedding"))
def test_writing_the_weight_writes_the_backbone(case: Case):
    """In place or by assignment: the adapter then acts on the new weight, and removing it leaves that weight."""
    inputs = case.host.inputs()
    for assign in (False, True):
        model, _ = grafted(case)
        twin = fresh(case.host)
        new = torch.randn(twin.site.weight.shape, generator=torch.Generator().manual_seed(2))
        for m in (model, twin):
            if assign:
                m.site.weight = nn.Parameter(new.clone(), requires_grad=m is twin)
            else:
                with torch.no_grad():
                    m.site.weight.copy_(new)
        if not case.setting.from_weight:
            grafted(case, model=twin)
            assert torch.equal(output(model, inputs), output(twin, inputs))
        gw.remove(model, "a")
        assert torch.equal(model.site.weight, new) and type(model.site) is type(fresh(case.host).site)
        assert torch.equal(output(model, inputs), output(_with(case, new), inputs))


def _with(case: Case, weight: torch.Tensor) -> nn.Module:
    model = fresh(case.host)
    with torch.no_grad():
        model.site.weight.copy_(weight)
    return model


@where(lambda case: case.host.name in ("gpt2", "llama", "bert") and case.setting.label != "embed")
def test_resizing_the_embeddings_under_an_adapter(case: Case):
    """A new vocabulary is the backbone's own: the adapter acts as before, and goes as before."""
    model, _ = grafted(case)
    inputs = case.host.inputs()
    before = output(model, inputs)
    with torch.random.fork_rng():
        model.resize_token_embeddings(56)
    after = output(model, inputs)
    if case.host.name == "bert":
        assert torch.equal(after, before)
    else:
        close(after[..., :48], before)
    gw.remove(model, "a")
    base = output(fresh(case.host), inputs)
    close(output(model, inputs)[..., : base.shape[-1]], base)


@where(lambda case: merges(case) and case.host.name == "embedding")
def test_a_tied_weight_stays_the_plain_one(case: Case):
    """Tying to a grafted embedding shares the parameter, not its adapted value."""
    model, _ = grafted(case)
    other = nn.Linear(20, 48, bias=False)
    other.weight = model.site.weight
    assert other.weight is model.site._parameters["weight"]
    x = torch.randn(2, 20)
    assert torch.equal(other(x), x @ fresh(BY_NAME["embedding"]).site.weight.T)


@where(lambda case: merges(case) and case.host.name in ("linear_square", "bert"))
def test_a_second_graft_on_merged_weights_is_refused_or_kept_apart(case: Case):
    model, _ = grafted(case)
    gw.merge(model)
    before = Snapshot(model)
    with pytest.raises(gw.GraftError, match="unmerge"):
        leave_init(gw.graft(model, case.method, "b", head=False))
    before.same(model)
