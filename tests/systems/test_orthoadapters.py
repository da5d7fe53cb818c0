"""Vidoni et al. 2020: adapters pushed to add what is orthogonal to what is there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, bert_of, closed_form, gpt2, ids, masked_bert, spread, vit
from torch.optim.optimizer import register_optimizer_step_post_hook

import graftwork as gw
from graftwork.combinators.ortho import cosine
from graftwork.core.errors import GraftError
from graftwork.train import DataSettings, FitSettings, TrainSettings, train

pytestmark = pytest.mark.system("orthoadapters")
L = 2


def near(**options):
    """An adapter behind every feed-forward layer, joint unless asked otherwise."""
    of = gw.Bottleneck(d=8, act="relu", init="bert", at="mlp")
    return gw.Ortho(of=of, **{"mode": "joint"} | options)


def objective(model, x=None, **more) -> torch.Tensor:
    """L_ORT of one training pass."""
    model.train()(ids() if x is None else x, **more)
    return gw.auxiliary_loss(model)


class Constant(torch.nn.Module):
    """Stands in the place of a delta: adds what make(y) says."""

    def __init__(self, make):
        super().__init__()
        self.make, self.p = make, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, y):
        return y + self.make(y) + 0 * self.p

    def auxiliary_loss(self):
        return None

    def overrides(self, function):
        return function == "forward"


def adding(make, **options):
    """A model whose adapters add make(y)."""
    model = masked_bert(layers=L)
    adapter = gw.graft(model, near(**options), head=False)
    for delta in adapter.deltas():
        delta.delta = Constant(make)
    return model


# -- 1. the values of the objective


def orthogonal(y: torch.Tensor) -> torch.Tensor:
    """The neighbours of a pair change places, one with the other sign: orthogonal to y."""
    even, odd = y[..., ::2], y[..., 1::2]
    return torch.stack([-odd, even], -1).flatten(-2)


@pytest.mark.parametrize("form", ["squared", "abs"])
def test_orthoadapters__zero_where_orthogonal_one_where_parallel(form):
    assert objective(adding(orthogonal, form=form)).item() == pytest.approx(0.0, abs=1e-5)
    for c in (0.5, -3.0):
        model = adding(lambda y, c=c: c * y, form=form)
        # a mean over L layers and T tokens: the sum is T L
        assert objective(model).item() == pytest.approx(1.0, rel=1e-5)
        assert objective(adding(lambda y, c=c: c * y, form=form, weight=0.3)).item() == pytest.approx(0.3, rel=1e-5)


def test_orthoadapters__scaling_what_is_added_changes_nothing():
    y, a = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cosine(y, 7.0 * a), cosine(y, a))
    torch.testing.assert_close(cosine(y, a), (y * a).sum(-1) / (y.norm(dim=-1) * a.norm(dim=-1)))


def test_orthoadapters__objective_is_its_equation():
    model = masked_bert(layers=L)
    adapter = gw.graft(model, near(weight=0.7), head=False)
    spread(adapter)
    seen = []
    for delta in adapter.deltas():
        inside = delta.delta
        inside.register_forward_hook(lambda m, args, out: seen.append((args[1], out)))
    found = objective(model)
    terms = [(F.cosine_similarity(y, out - y, dim=-1) ** 2).mean() for y, out in seen]
    assert len(terms) == L
    torch.testing.assert_close(found, 0.7 * sum(terms) / L)


def test_orthoadapters__at_a_norm_the_residual_stream_is_compared():
    model = masked_bert(layers=L)
    (method,) = gw.OrthoAdapters(task=True, mode="joint")
    spread(gw.graft(model, method, head=False))
    assert 0 < objective(model).item() < 1
    plain = masked_bert(layers=L)
    spread(gw.graft(plain, gw.MADXTask(), head=False))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids()).logits, plain(ids()).logits)


def test_orthoadapters__an_adapter_that_adds_nothing_has_finite_gradients():
    model = masked_bert(layers=L)
    adapter = gw.graft(model, gw.Ortho(of=gw.Bottleneck(d=4, at="mlp"), mode="joint"), head=False)  # U starts at zero
    loss = objective(model)
    assert loss == 0.0
    (model(ids(), labels=ids()).loss + loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


# -- 2. who feels it


def test_orthoadapters__padding_contributes_nothing():
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    values = []
    for filler in (5, 40):
        model = masked_bert(layers=L)
        spread(gw.graft(model, near(), head=False))
        x = ids()
        x[1, 4:] = filler
        values.append(objective(model, x, attention_mask=mask))
    torch.testing.assert_close(*values)
    one = masked_bert(layers=L)
    spread(gw.graft(one, near(), head=False))
    assert abs(objective(one) - values[0]) > 1e-5


def test_orthoadapters__backbone_and_frozen_adapters_stay_as_they_are():
    model = masked_bert(layers=L)
    language = gw.graft(model, gw.OrthoAdapters(mode="joint"), "de", head=False)
    spread(language)
    task = gw.graft(model, gw.OrthoAdapters(task=True, mode="joint"), "ner", head=False)
    spread(task)
    language.trainable = False
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gw.activate(model, "de >> ner")
    loss = objective(model)
    assert all(delta.auxiliary_loss() is None for delta in language.deltas())
    loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    own = {id(p) for p in task.parameters()}
    changed = {id(p) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= own
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


# -- 3. training


def test_orthoadapters__the_objective_alone_makes_them_orthogonal():
    model = masked_bert(layers=L)
    adapter = gw.graft(model, near(form="squared"), head=False, seed=0)
    spread(adapter)
    x = ids(8, 7)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)

    def mean_abs() -> float:
        found = []
        handles = [
            d.delta.register_forward_hook(
                lambda m, args, out: found.append(cosine(args[1], out - args[1]).abs().mean())
            )
            for d in adapter.deltas()
        ]
        with torch.no_grad():
            model(x)
        for handle in handles:
            handle.remove()
        return float(torch.stack(found).mean())

    assert mean_abs() > 0.08
    for _ in range(150):
        optimizer.zero_grad()
        objective(model, x).backward()
        optimizer.step()
    assert mean_abs() < 0.05


@pytest.mark.parametrize("mode", ["joint", "alternating"])
def test_orthoadapters__weight_zero_is_the_plain_run(mode):
    results = []
    of = gw.Bottleneck(d=8, act="relu", init="bert", at="mlp")
    for method in (of, gw.Ortho(of=of, weight=0.0, mode=mode)):
        model = masked_bert(layers=L)
        adapter = gw.graft(model, method, head=False, seed=0)
        assert not method.needs
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        for seed in range(4):
            optimizer.zero_grad()
            (model.train()(ids(seed=seed), labels=ids(seed=seed)).loss + gw.auxiliary_loss(model)).backward()
            optimizer.step()
        results.append([p.detach() for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- 4. two optimiser steps


def test_orthoadapters__alternating_keeps_the_terms_apart():
    model = masked_bert(layers=L)
    spread(gw.graft(model, near(mode="alternating"), head=False))
    joint = masked_bert(layers=L)
    spread(gw.graft(joint, near(mode="joint"), head=False))
    expected = objective(joint)
    assert objective(model) == 0.0
    torch.testing.assert_close(gw.auxiliary_loss(model, apart=True), expected)
    assert gw.auxiliary_loss(joint, apart=True) == 0.0


@pytest.mark.parametrize(("options", "times"), [("", 2), (", mode='joint'", 1), (", weight=0", 1)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_orthoadapters__the_trainer_steps_twice_for_each_batch(options, times, accumulate, tmp_path):
    model = masked_bert(layers=L)
    folder = tmp_path / "backbone"
    model.save_pretrained(folder)
    words_of(folder)
    (tmp_path / "rows.csv").write_text("text,label\n" + "a b c,0\nd e f,1\n" * 8)
    steps = []
    hook = register_optimizer_step_post_hook(lambda *a: steps.append(1))
    try:
        train(
            TrainSettings(
                str(folder), str(tmp_path / "out"), DataSettings(str(tmp_path / "rows.csv")),
                f"ortho(of=bottleneck(d=4, init='bert'){options})", name="it",
                fit=FitSettings(steps=3, batch=2, accumulate=accumulate, lr=1e-3),
            )
        )  # fmt: skip
    finally:
        hook.remove()
    assert len(steps) == 3 * times


def words_of(folder) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *"abcdef"])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


# -- what is stored, other backbones, refusals


def test_orthoadapters__the_file_is_that_of_the_adapter_inside(tmp_path):
    model = masked_bert(layers=L)
    spread(gw.graft(model, gw.OrthoAdapters(), "de", head=False))
    copy.deepcopy(model)
    gw.save(model, "de", tmp_path / "de")
    other = masked_bert(layers=L)
    assert [m.name for m in gw.load(other, tmp_path / "de").methods] == ["bottleneck"]
    with torch.no_grad():
        assert torch.equal(other(ids()).logits, model(ids()).logits)


def test_orthoadapters__parameters_are_those_of_mad_x():
    model = bert_of("base")
    assert closed_form(model, gw.OrthoAdapters()) == closed_form(model, gw.MADXLanguage(coupling="none")) == 7_091_712
    assert closed_form(model, gw.OrthoAdapters(task=True)) == closed_form(model, gw.MADXTask()) == 894_528
    assert gw.graft(model, gw.OrthoAdapters(task=True), head=False).num_parameters == 894_528


@pytest.mark.parametrize("make", [gpt2, vit])
def test_orthoadapters__other_backbones(make):
    model = make()
    spread(gw.graft(model, near(), head=False))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) if make is vit else ids()
    loss = objective(model, x)
    assert 0 < loss.item() < 1
    loss.backward()


def test_orthoadapters__refusals():
    model = bert()
    for of in (gw.LoRA(r=2), gw.Prefix(length=3)):
        with pytest.raises(GraftError, match="does not add to an activation"):
            gw.graft(model, gw.Ortho(of=of), head=False)
    assert not gw.adapters(model)
    with pytest.raises(GraftError, match="weight=-1"):
        gw.Ortho(weight=-1.0)
    with pytest.raises(GraftError, match="mode='both'"):
        gw.Ortho(mode="both")
    with pytest.raises(GraftError, match="of its own"):
        gw.Ortho(of=gw.AdaMix())
