"""Pfeiffer et al. 2021: a trained attention over the outputs of several frozen adapters.

The paper attends to z_n with the residual inside; the code its authors released attends to what each adapter adds, u_n = z_n - y, and
adds the residual behind (their option residual_before is the paper's). Here `residual` says which. Both have the same weights s, since
q . K y is the same for all n, and for V = I the same output.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, bert_of, closed_form, ids, llama, spread
from routing_models import members, pfeiffer, set_value, shares, states
from value_models import randomly

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("adapterfusion")

METHODS = [
    pytest.param(pfeiffer(), id="pfeiffer"),
    pytest.param(gw.Pfeiffer(d=4), id="block"),
    pytest.param(gw.Parallel(d=4), id="parallel"),
    pytest.param(gw.LoRA(r=2, at="q, up"), id="lora"),
    pytest.param(gw.IA3(), id="ia3"),
    pytest.param(gw.Prefix(length=3), id="prefix"),
]


def fusion(model, names="ab", **options) -> gw.Adapter:
    """A fusion with random Q and K, and with V = I to the bit."""
    method = gw.Fusion(of=list(names), **options)
    adapter = gw.graft(model, method, "f", head=False)
    spread(adapter, 0.1)
    if method.value:
        set_value(adapter, torch.eye)
    return adapter


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("methods", METHODS)
def test_adapterfusion__one_adapter_is_itself(methods, residual):
    model = members(bert(), methods, "a")
    alone = states(model, "a")
    fusion(model, "a", residual=residual)
    torch.testing.assert_close(states(model, "f"), alone, atol=1e-5, rtol=1e-5)
    assert all((s == 1).all() for s in shares(model, "f").values())
    assert not torch.allclose(states(model, None), alone, atol=1e-2)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("methods", METHODS)
def test_adapterfusion__copies_of_one_adapter_are_it(methods, residual):
    model = members(bert(), methods, "a")
    alone = states(model, "a")
    for name in "bc":
        copy = gw.graft(model, methods, name, head=False)
        for p, q in zip(copy.parameters(), gw.adapters(model)["a"].parameters(), strict=True):
            p.data = q.data.clone()
    adapter = fusion(model, "abc", residual=residual)
    torch.testing.assert_close(states(model, "f"), alone, atol=1e-5, rtol=1e-5)
    # and V sees what they give, whatever Q and K: for copies it is as if there were one
    set_value(adapter, lambda d: torch.diag(torch.linspace(-1, 1, d)))
    turned = states(model, "f")
    for delta in adapter.deltas():
        delta.query.data.neg_()
    torch.testing.assert_close(states(model, "f"), turned, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(turned, alone, atol=1e-3)


def test_adapterfusion__stage_two_leaves_adapters_and_backbone_to_the_bit():
    model = members(bert(), pfeiffer(), "ab")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gw.graft(model, gw.Fusion(of=["a", "b"]), "f")  # the target head is trained with it
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in gw.adapters(model)["f"].parameters()}
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    loss = model(ids(), labels=torch.tensor([0, 1])).loss + gw.auxiliary_loss(model)
    loss.backward()
    assert all(p.grad is None for name in "ab" for p in gw.adapters(model)[name].parameters())
    assert all(p.grad is not None for p in trained)
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    fused = gw.adapters(model)["f"]
    assert {site.role for site in fused.sites} == {"norm", "head"}
    for delta in fused.parts[0].deltas.values():  # not the bias of the keys: it is a constant on all scores
        moved = {n for n, p in delta.named_parameters() if p.grad.abs().max() > 0}
        assert moved >= {"query", "query_bias", "key_weight", "value"}


def test_adapterfusion__joint_trains_the_adapters_too():
    model = members(bert(), pfeiffer(), "ab")
    gw.graft(model, gw.Fusion(of=["a", "b"], joint=True), "f", head=False)
    model(ids()).logits.sum().backward()
    assert all(p.grad is not None for name in "ab" for p in gw.adapters(model)[name].parameters())


@pytest.mark.parametrize("methods", METHODS[:3])
def test_adapterfusion__a_constant_on_all_scores_and_weights_per_token(methods):
    model = members(bert(), methods, "abc")
    adapter = fusion(model, "abc")
    before = shares(model, "f")
    assert before.keys() == {site.key for site in adapter.sites}
    for s in before.values():
        assert s.shape == (2, 7, 3)
        torch.testing.assert_close(s.sum(-1), torch.ones(2, 7))
        assert (s[0, 0] - s[0, 1]).abs().max() > 1e-3  # two tokens of one sentence
    for delta in adapter.deltas():
        delta.key_bias.data += 3.0  # adds q . 3 to the score of every adapter
    for key, s in shares(model, "f").items():
        torch.testing.assert_close(s, before[key], atol=1e-5, rtol=1e-5)
    for delta in adapter.deltas():
        delta.key_weight.data.neg_()
    assert all((s - before[key]).abs().max() > 1e-2 for key, s in shares(model, "f").items())


def test_adapterfusion__the_regulariser():
    model = members(bert(), pfeiffer(), "ab")
    adapter = gw.graft(model, gw.Fusion(of=["a", "b"]), "f", head=False)
    n, d = len(adapter.sites), 32
    assert n == 2
    at_start = gw.auxiliary_loss(model)
    assert at_start.item() == pytest.approx(0.01 * n * d * (d - 1) * 1e-12, rel=1e-3)  # 1e-6 beside the diagonal
    direction = torch.randn(d, d, generator=torch.Generator().manual_seed(0))
    for e in (0.0, 0.1, 0.2, 0.4):
        set_value(adapter, lambda d, e=e: torch.eye(d) + e * direction)
        wanted = 0.01 * n * e**2 * float(direction.square().sum())
        assert gw.auxiliary_loss(model).item() == pytest.approx(wanted, rel=1e-5)
    gw.auxiliary_loss(model).backward()
    for delta in adapter.deltas():
        torch.testing.assert_close(delta.value.grad, 0.02 * 0.4 * direction, atol=1e-6, rtol=1e-5)
    gw.graft(model, gw.Fusion(of=["a", "b"], value=False), "static", head=False)
    assert gw.auxiliary_loss(model) == 0.0  # only where V is trained


@pytest.mark.parametrize("value", [True, False])
def test_adapterfusion__count_oracle_on_bert_base(value):
    model = bert_of("base")
    for name in "ab":
        gw.graft(model, pfeiffer(48), name, head=False)
    method = gw.Fusion(of=["a", "b"], value=value)
    adapter = gw.graft(model, method, "f", head=False)
    wanted = 12 * ((3 if value else 2) * 768**2 + 2 * 768)
    assert adapter.num_parameters == wanted == sum(method.count(site) for site in adapter.sites)
    assert wanted == (21_252_096 if value else 14_174_208)
    assert closed_form(model, [pfeiffer(48)]) == gw.adapters(model)["a"].num_parameters


def test_adapterfusion__starts_with_queries_and_keys_at_002_and_v_near_the_identity():
    model = members(bert(), pfeiffer(), "ab")
    for delta in gw.graft(model, gw.Fusion(of=["a", "b"]), "f", head=False, seed=0).deltas():
        for t in (delta.query, delta.key_weight):
            assert 0.018 < t.std().item() < 0.022 and abs(t.mean().item()) < 0.002
        assert not delta.query_bias.any() and not delta.key_bias.any()
        assert torch.equal(delta.value.diagonal(), torch.ones(32))
        torch.testing.assert_close(delta.value - torch.eye(32), 1e-6 * (1 - torch.eye(32)), atol=0, rtol=1e-6)


def released(h, x, norm, up, fusion, residual_before):
    """BertFusion as its authors released it, between the sub-layer's output h and the norm behind it, for dropout and T at rest.

    h [batch, seq, d], x the residual stream;  up: what the adapters add, without a residual, for norm(h + x).
    """
    query = norm(h + x)  # query_before_ln=False
    values = torch.stack([u(query) for u in up], 2)  # [batch, seq, n, d]
    if residual_before:
        values = values + h[:, :, None]
    q = F.linear(query, fusion.query, fusion.query_bias)[:, :, None]
    k = F.linear(values, fusion.key_weight, fusion.key_bias)
    s = torch.softmax((q @ k.mT).squeeze(2), -1)
    mixed = (s[:, :, None] @ F.linear(values, fusion.value)).squeeze(2)
    return norm((mixed if residual_before else mixed + h) + x)


@pytest.mark.parametrize("identity", [True, False])
def test_adapterfusion__is_the_released_code(identity):
    """Layer by layer of a BERT: norm(h + x + sum_n s_n V u_n)."""
    model = members(bert(), pfeiffer(), "abc")
    adapter = fusion(model, "abc")
    if not identity:
        set_value(adapter, lambda d: torch.eye(d) + 0.3 * torch.randn(d, d, generator=torch.Generator().manual_seed(5)))
    seen = {}
    for i, layer in enumerate(model.bert.encoder.layer):
        layer.output.dropout.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__((i, "h"), out))
        layer.attention.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__((i, "x"), out[0]))
        layer.register_forward_hook(
            lambda m, a, out, i=i: seen.__setitem__((i, "out"), out[0] if isinstance(out, tuple) else out)
        )
    states(model, "f")
    for i, layer in enumerate(model.bert.encoder.layer):
        norm, key = layer.output.LayerNorm, f"bert.encoder.layer.{i}.output.LayerNorm:norm"
        up = [gw.adapters(model)[n].parts[0].deltas[key].branch for n in "abc"]
        plain = lambda t, norm=norm: F.layer_norm(t, (32,), norm.weight, norm.bias, norm.eps)  # noqa: E731
        with torch.no_grad():
            by_code = [
                released(seen[i, "h"], seen[i, "x"], plain, up, adapter.parts[0].deltas[key], before)
                for before in (False, True)
            ]
        torch.testing.assert_close(seen[i, "out"], by_code[0], atol=1e-5, rtol=1e-5)
        assert torch.allclose(*by_code, atol=1e-5) is identity  # the paper's reading and the code's are one at V = I


@pytest.mark.parametrize("identity", [True, False])
def test_adapterfusion__both_readings_are_one_where_v_is_the_identity(identity):
    model = members(bert(), pfeiffer(), "abc")
    added = fusion(model, "abc")
    whole = gw.graft(model, gw.Fusion(of=["a", "b", "c"], residual=True), "whole", head=False)
    for delta, other in zip(added.deltas(), whole.deltas(), strict=True):
        if not identity:
            delta.value.data += 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
        other.load_state_dict(delta.state_dict())
    first = next(iter(shares(model, "f")))
    torch.testing.assert_close(shares(model, "f")[first], shares(model, "whole")[first], atol=1e-5, rtol=1e-5)
    assert torch.allclose(states(model, "f"), states(model, "whole"), atol=1e-5) is identity


def test_adapterfusion__the_query_is_what_the_adapters_read():
    """h is the output that adapters behind a block edit, and what goes into the feed-forward layer for those beside it."""
    for methods, same in ((gw.Pfeiffer(d=4), True), (gw.Parallel(d=4), False)):
        model = members(llama(), methods, "ab")
        one = fusion(model)
        two = gw.graft(model, gw.Fusion(of=["a", "b"], query_output=True), "y", head=False)
        for delta, other in zip(one.deltas(), two.deltas(), strict=True):
            other.load_state_dict(delta.state_dict())
        assert torch.allclose(states(model, "f"), states(model, "y"), atol=1e-6) is same


def test_adapterfusion__stacks_are_fused_and_saved(tmp_path):
    def fresh():
        return members(bert(), pfeiffer(), ["de", "en", "ner"])

    model = fresh()
    adapter = gw.graft(model, gw.Fusion(of=["de >> ner", "en >> ner"]), "f", head=False)
    spread(adapter)
    by_name = states(model, "f")
    assert torch.equal(by_name, states(model, "fuse(de >> ner, en >> ner)"))
    gw.save(model, "f", tmp_path / "f")
    other = fresh()
    gw.load(other, tmp_path / "f")
    assert torch.equal(states(other, "f"), by_name)
    with pytest.raises(GraftError, match="de"):
        gw.load(bert(), tmp_path / "f")
    randomly(other, pfeiffer(), "task", 9)
    torch.testing.assert_close(states(other, "f >> task"), states(other, "fuse(de >> ner, en >> ner, by=f) >> task"))


@pytest.mark.parametrize(
    ("ask", "found"),
    [
        (lambda m: gw.graft(m, gw.Fusion(of=["a", "nobody"]), "f"), "nobody"),
        (lambda m: gw.graft(m, gw.Fusion(of=["a", "a"]), "f"), "twice"),
        (lambda m: gw.graft(m, gw.Fusion(), "f"), "mixes nothing"),
        (lambda m: gw.activate(m, "fuse(a, b)"), "no adapter was made for it"),
        (lambda m: gw.activate(m, "fuse(a, b, by=a)"), "not an adapter of a mixing method"),
    ],
)
def test_adapterfusion__refusals_change_nothing(ask, found):
    model = members(bert(), pfeiffer(), "ab")
    gw.activate(model, "a")
    before, out = set(dict(model.named_parameters())), states(model, "a")
    with pytest.raises(GraftError, match=found):
        ask(model)
    assert set(dict(model.named_parameters())) == before and gw.active(model) == "a"
    assert torch.equal(states(model, "a"), out)


def test_adapterfusion__what_the_target_task_trains_of_its_own_is_not_mixed():
    """A pooler that came without weights is trained by every adapter, as part of its head: that of the fusion stands alone."""
    model = members(bert(), [*gw.Pfeiffer(d=4), gw.Full(at="pooler")], "ab")
    adapter = gw.graft(model, [gw.Fusion(of=["a", "b"]), gw.Full(at="pooler")], "f")
    assert "pooler" not in {site.role for site in adapter.parts[0].sites}
    model(ids()).logits.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert all(p.grad is None for name in "ab" for p in gw.adapters(model)[name].parameters())
    with torch.no_grad():
        last = model(ids(), output_hidden_states=True)
        delta = adapter.parts[1].deltas["bert.pooler.dense:pooler"]
        pooled = torch.tanh(F.linear(last.hidden_states[-1][:, 0], *delta.parameters()))
        values = adapter.parts[2].deltas["classifier:head"]
        torch.testing.assert_close(last.logits, F.linear(pooled, *values.parameters()), atol=1e-5, rtol=1e-5)
    mixed = gw.graft(model, gw.Fusion(of=["a", "b"]), "g")  # without one of its own it is mixed, like any other place
    assert "pooler" in {site.role for site in mixed.parts[0].sites}
