"""He et al. 2022: adapters pruned at initialisation by a fixed mask."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, bert_of, closed_form, ids, spread

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("sparseadapter")
LABELS = torch.tensor([0, 1, 1, 0])
BATCH = {"input_ids": ids(4), "labels": LABELS}


def host(**more):
    return gw.Bottleneck(**{"d": 6, "init": "houlsby", "init_std": 0.1, "at": "attn, mlp", **more})


def sparse(model, seed=0, **hyper):
    return gw.graft(model, gw.Sparse(**{"of": host(), **hyper}), head=False, seed=seed)


def masks(adapter):
    return {(key, n): d.mask(n).clone() for key, d in adapter.parts[0].deltas.items() for n in d.matrices()}


def logits(model):
    with torch.no_grad():
        return model(ids(4)).logits


@pytest.mark.parametrize("by", ["magnitude", "random", "snip", "grasp", "synflow"])
@pytest.mark.parametrize("scope, rounds", [("global", 1), ("local", 1), ("global", 3)])
def test_sparseadapter__kept_count_is_exact(by, scope, rounds):
    model = bert(attn_implementation="eager")
    methods = [gw.Sparse(of=host(), by=by, scope=scope, rounds=rounds, density=0.37)]
    adapter = gw.graft(model, methods, head=False)
    if by in ("snip", "grasp", "synflow"):
        gw.calibrate(model, [BATCH], {"grasp": gw.grasp_loss, "synflow": gw.synflow_loss}.get(by))
    kept = [int(m.sum()) for m in masks(adapter).values()]
    sizes = [m.numel() for m in masks(adapter).values()]
    assert sizes == [6 * 32] * 8
    vectors = 4 * (6 + 32)
    if scope == "local":
        assert kept == [n - math.floor(0.63 * n) for n in sizes]
    else:
        assert sum(kept) == sum(sizes) - math.floor(0.63 * sum(sizes))
        assert len(set(kept)) > 1
    assert adapter.num_parameters == closed_form(model, methods) == sum(kept) + vectors
    for (key, name), mask in masks(adapter).items():
        w = adapter.parts[0].deltas[key].delta.get_parameter(name)
        assert not w[~mask].any() and w[mask].all()


def test_sparseadapter__global_scope_may_empty_a_matrix_and_local_never():
    def small(adapter):
        delta = adapter.parts[0].deltas[adapter.sites[0].key]
        return int(delta.mask("down").sum())

    model = bert()
    for scope, expected in (("global", 0), ("local", 6 * 32 - math.floor(0.5 * 6 * 32))):
        adapter = gw.graft(model, gw.Sparse(of=host(init_std=1e-4), scope=scope, density=0.5), scope, head=False)
        first = adapter.parts[0].deltas[adapter.sites[0].key]
        method = adapter.methods[0]
        for delta in adapter.deltas():  # scored again with one matrix far below the others
            for name, w in delta.matrices().items():
                w.data = torch.rand(w.shape, generator=torch.Generator().manual_seed(len(name))) + 1
                delta.mask(name).fill_(True)
        first.delta.down.data *= 1e-6
        method.decide(list(adapter.deltas()))
        assert small(adapter) == expected


def test_sparseadapter__masks_are_nested_over_rounds_and_nothing_revives():
    model = bert()
    adapter = sparse(model, by="snip", rounds=3, density=0.2)
    seen = []
    method = adapter.methods[0]
    prune = type(method).prune

    def recording(self, deltas, e, scores):
        prune(self, deltas, e, scores)
        seen.append(masks(adapter))

    type(method).prune = recording
    try:
        gw.calibrate(model, [BATCH])
    finally:
        type(method).prune = prune
    total = sum(m.numel() for m in seen[0].values())
    assert len(seen) == 3
    for e, now in enumerate(seen, 1):
        assert sum(int(m.sum()) for m in now.values()) == total - math.floor((1 - 0.2 ** (e / 3)) * total)
        if e > 1:
            assert all((now[k] <= seen[e - 2][k]).all() for k in now)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(4):
        optimiser.zero_grad()
        model(**BATCH).loss.backward()
        for key, name in seen[-1]:
            assert not adapter.parts[0].deltas[key].delta.get_parameter(name).grad[~seen[-1][key, name]].any()
        optimiser.step()
    for (key, name), mask in seen[-1].items():
        w = adapter.parts[0].deltas[key].delta.get_parameter(name)
        assert not w.detach()[~mask].view(torch.int32).any()  # zero to the bit
        assert w.detach()[mask].all()
    linear = gw.Sparse(density=0.2, rounds=4, schedule="linear")
    assert [round(linear.share(e), 6) for e in (1, 2, 3, 4)] == [0.8, 0.6, 0.4, 0.2]


def test_sparseadapter__snip_is_the_derivative_in_a_gate():
    model = bert().double()
    adapter = sparse(model, by="snip")
    method, part = adapter.methods[0], adapter.parts[0]
    batches = [BATCH, {"input_ids": ids(4, seed=9), "labels": 1 - LABELS}]
    method.calibrating(part)
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        method.calibrate(part)
    delta = next(iter(part.deltas.values()))
    for name, (i, j) in (("down", (2, 5)), ("up", (7, 1))):
        w = delta.delta.get_parameter(name)
        value, expected = w[i, j].item(), 0.0
        for batch in batches:
            losses = []
            for c in (1 + 1e-3, 1 - 1e-3):  # a gate on this one weight
                with torch.no_grad():
                    w[i, j] = c * value
                    losses.append(model(**batch).loss)
                    w[i, j] = value
            expected += float(((losses[0] - losses[1]) / 2e-3).abs())
        assert expected > 0
        torch.testing.assert_close(delta.scores[name][i, j].item(), expected, rtol=1e-4, atol=1e-12)


def test_sparseadapter__grasp_is_w_times_hessian_times_gradient():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    adapter = gw.graft(model, gw.Sparse(of=host(d=2, at="/^0$/"), by="grasp"), head=False)
    spread(adapter)
    for p in adapter.parameters():
        p.data = p.data.double()
    (delta,) = adapter.deltas()
    method, part = adapter.methods[0], adapter.parts[0]
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])

    def loss():
        return F.cross_entropy(model(x) / 200, y)

    method.calibrating(part)
    method.observe(part, loss())
    weights = list(delta.matrices().values())
    g = [v.clone() for v in torch.autograd.grad(loss(), weights)]
    eps, scale = 1e-4, max(float(v.abs().max()) for v in g)
    around = []
    for sign in (1, -1):  # H g by a difference of gradients along g
        with torch.no_grad():
            for w, v in zip(weights, g, strict=True):
                w.add_(v, alpha=sign * eps / scale)
        around.append(torch.autograd.grad(loss(), weights))
        with torch.no_grad():
            for w, v in zip(weights, g, strict=True):
                w.sub_(v, alpha=sign * eps / scale)
    for (name, w), plus, minus in zip(delta.matrices().items(), *around, strict=True):
        expected = w.detach() * (plus - minus) / (2 * eps / scale)
        torch.testing.assert_close(delta.scores[name], expected, rtol=1e-4, atol=1e-14)


def test_sparseadapter__synflow_uses_absolute_weights_only_while_scoring():
    model = bert()
    adapter = sparse(model, by="synflow")
    before = logits(model)
    method, part = adapter.methods[0], adapter.parts[0]
    method.calibrating(part)
    scored = logits(model)
    assert not torch.allclose(scored, before)
    expected = {}
    gw.synflow_loss(model, BATCH).backward()
    for key, delta in part.deltas.items():
        expected |= {(key, n): (w * w.grad).abs() for n, w in delta.matrices().items()}
    method.calibrate(part)
    assert all(torch.equal(part.deltas[k].scores[n], v) for (k, n), v in expected.items())
    method.calibrated(part)
    plain = bert()
    other = gw.graft(plain, host(), head=False)
    for key, delta in other.parts[0].deltas.items():
        delta.load_state_dict(part.deltas[key].delta.state_dict())
    torch.testing.assert_close(logits(model), logits(plain))


@pytest.mark.parametrize(
    "of", ["bottleneck(d=6, init='houlsby', at='mlp')", "lora(r=3)", "prefix(length=3)", "dora(r=2)"]
)
def test_sparseadapter__density_one_is_the_host(of):
    (inside,) = gw.parse_methods(of)
    outputs = []
    for methods in (inside, gw.Sparse(of=inside, density=1.0)):
        model = bert()
        spread(gw.graft(model, methods, head=False), 0.1)
        outputs.append(logits(model))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("of", ["lora(r=4)", "bottleneck(d=6, at='mlp')"])
def test_sparseadapter__matrices_that_start_at_zero_keep_their_share_and_learn(of):
    (inside,) = gw.parse_methods(of)
    model = bert()
    base = logits(model)
    adapter = gw.graft(model, gw.Sparse(of=inside, density=0.25), head=False)
    assert torch.equal(logits(model), base)
    for (_, name), mask in masks(adapter).items():
        assert 0.1 < mask.float().mean() < 0.45, name
    optimiser = torch.optim.Adam(adapter.parameters(), lr=0.05)
    first = last = None
    for _ in range(8):
        optimiser.zero_grad()
        loss = model(**BATCH).loss
        loss.backward()
        optimiser.step()
        first, last = first if first is not None else float(loss.detach()), float(loss.detach())
    assert last < first


def test_sparseadapter__weights_merge_as_their_host_does():
    model = bert()
    spread(gw.graft(model, gw.Sparse(of=gw.LoRA(r=4), density=0.5), head=False), 0.2)
    expected = logits(model)
    gw.merge(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    gw.unmerge(model)
    assert torch.equal(logits(model), expected)


def test_sparseadapter__equal_scores_and_missing_calibration_are_errors():
    model = bert()
    gw.graft(model, gw.Sparse(of=host(init="lora"), by="snip"), head=False)
    with pytest.raises(GraftError, match="all 1,536 are equal"):
        gw.calibrate(model, [BATCH])  # U = 0: neither U nor, through it, D moves the loss in proportion to itself
    zero = bert()
    gw.graft(zero, gw.Sparse(of=gw.LoRA(r=2), by="snip"), head=False)
    zero.train()
    with pytest.raises(GraftError, match=r"gw\.calibrate"):
        zero(**BATCH)
    with pytest.raises(GraftError, match="no matrices"):
        gw.graft(bert(), gw.Sparse(of=gw.IA3()), head=False)


def test_sparseadapter__file_is_small_and_comes_back(tmp_path):
    wide = gw.Bottleneck(d=64, init="houlsby", init_std=0.1, at="attn, mlp")
    size = {}
    model = bert()
    for name, methods in (("dense", wide), ("sparse", gw.Sparse(of=wide, density=0.2))):
        adapter = gw.graft(model, methods, name, head=False)
        optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
        model(**BATCH).loss.backward()
        optimiser.step()
        gw.save(model, name, tmp_path / name)
        gw.save(model, name, tmp_path / f"{name}-resume", resume=True)
        size[name] = (tmp_path / name / "adapter.safetensors").stat().st_size
    assert size["sparse"] < 0.4 * size["dense"]
    expected = logits(model)
    for folder in ("sparse", "sparse-resume"):
        other = bert()
        loaded = gw.load(other, tmp_path / folder, trainable=True)
        assert torch.equal(logits(other), expected)
        assert loaded.num_parameters == adapter.num_parameters
        assert all(torch.equal(a, b) for a, b in zip(masks(loaded).values(), masks(adapter).values(), strict=True))
        model(**BATCH).loss.backward()
        other.train()
        other(**BATCH).loss.backward()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), expected)


def test_sparseadapter__calibrated_file_needs_no_calibration(tmp_path):
    model = bert()
    adapter = sparse(model, by="snip", density=0.5)
    gw.calibrate(model, [BATCH])
    gw.save(model, "default", tmp_path / "a")
    other = bert()
    loaded = gw.load(other, tmp_path / "a", trainable=True)
    other.train()
    other(**BATCH).loss.backward()
    assert loaded.num_parameters == adapter.num_parameters
    assert torch.equal(logits(other.eval()), logits(model))


def test_sparseadapter__large_sparse_has_the_budget_of_the_small_one():
    model = bert_of("base")
    dense = 24 * 2 * 64 * 768
    kept = {}
    for widen in (1, 2, 4):
        methods = gw.SparseAdapter(widen=widen, sparsity=0.0, by="random")
        adapter = gw.graft(model, methods, f"x{widen}", head=False)
        vectors = 24 * (64 * widen + 768)
        assert adapter.num_parameters == closed_form(model, methods)
        kept[widen] = adapter.num_parameters - vectors
    assert kept == {1: dense, 2: dense, 4: dense}
