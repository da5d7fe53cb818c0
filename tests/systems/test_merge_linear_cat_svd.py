"""Weighted merging of LoRAs: linear, cat, svd, slerp; side by side with HF PEFT's add_weighted_adapter where that is right."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_models import bert, ids, llama
from torch import nn
from value_models import by_formula, change, keys, randomly, relative, three, weights_of
from weight_models import Attention, around, gpt2, mixtral

import graftwork as gw
from graftwork.core.errors import GraftError

merging = pytest.mark.system("merge-linear-cat-svd")
SIGNED = {"a": 0.5, "b": -1.2, "c": 2.0}


def target(model, weights, key):
    return sum(w * by_formula(model, n, key) for n, w in weights.items())


@merging
@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_merge_linear_cat_svd__cat_is_exact(make):
    """Unequal ranks, a negative weight, rsLoRA, unequal alpha, sites that only some have; square and oblong weights, packed
    and transposed ones."""
    model = three(make())
    made = gw.combine(model, "new", SIGNED)
    assert made.error < 1e-6
    for key in keys(model, "a", "b"):
        assert relative(change(model, "new", key), target(model, SIGNED, key)) < 1e-6
    assert {f.site: f.r for f in made.sites} == {
        key: 10 if ":v" not in key else 7 for key in keys(model, "a", "b")
    }  # sum r_e of those that are there


@merging
def test_merge_linear_cat_svd__several_alphas_in_one_adapter():
    model = bert()
    randomly(model, [gw.LoRA(r=2, alpha=1.0, at="q"), gw.LoRA(r=4, alpha=9.0, at="v, up")], "a", 1)
    randomly(model, [gw.LoRA(r=3, alpha=2.0, at="q, v")], "b", 2)
    made = gw.combine(model, "new", {"a": -1.0, "b": 0.25})
    assert made.error < 1e-6
    before = {key: change(model, "a", key) * -1.0 for key in keys(model, "a")}
    for key in keys(model, "b"):
        before[key] = before[key] + 0.25 * change(model, "b", key)
    for key, wanted in before.items():
        assert relative(change(model, "new", key), wanted) < 1e-5


@merging
def test_merge_linear_cat_svd__other_hosts():
    """Convolutions, embeddings and experts: the dense view is what is merged."""
    torch.manual_seed(0)
    for model, at in (
        (around(nn.Conv2d(6, 8, 3, groups=2)), "conv"),
        (around(nn.Embedding(11, 6)), "/site/"),
        (mixtral(), "expert.gate_up, expert.down"),
    ):
        randomly(model, gw.LoRA(r=2, alpha=3.0, at=at), "a", 1)
        randomly(model, gw.LoRA(r=3, alpha=1.0, at=at), "b", 2)
        assert gw.combine(model, "cat", {"a": 1.0, "b": -0.5}).error < 1e-6
        assert gw.combine(model, "svd", {"a": 1.0, "b": -0.5}, "svd", r=5).error < 1e-6
        for key in keys(model, "a"):
            wanted = target(model, {"a": 1.0, "b": -0.5}, key)
            assert relative(change(model, "cat", key), wanted) < 1e-5
            assert relative(change(model, "svd", key), wanted) < 1e-5


@merging
def test_merge_linear_cat_svd__several_methods_on_one_weight_and_its_bias():
    """Whatever stands in the two adapters, the sum changes every parameter of the backbone by the sum of their changes."""
    packed = Attention().eval()
    randomly(packed, gw.LoRA(r=2, at="q, v"), "a", 1)
    randomly(packed, gw.IA3(at="k, o"), "b", 2, std=0.1, around=True)
    whole = bert()
    randomly(whole, gw.Full(at="q, norm"), "a", 1, std=0.1, around=True)
    randomly(whole, [gw.LoRA(r=2), gw.LNTuning(), gw.IA3(at="q, down")], "b", 2, std=0.1, around=True)
    adaptive = bert()
    randomly(adaptive, [gw.LoRA(r=2, at="q"), gw.DoRA(r=2, at="q")], "a", 1, std=0.1, around=True)
    randomly(adaptive, gw.AdaLoRA(), "b", 2, std=0.1, around=True)
    for model, r in ((packed, 12), (whole, 32), (adaptive, 32)):
        plain, wanted = weights_of(model), {}
        for name, w in (("a", 0.5), ("b", -1.0)):
            gw.activate(model, name)
            gw.merge(model)
            for n, p in weights_of(model).items():
                wanted[n] = wanted.get(n, plain[n].double()) + w * (p.double() - plain[n].double())
            gw.unmerge(model)
        gw.combine(model, "new", {"a": 0.5, "b": -1.0}, "svd", r=r)
        gw.merge(model)
        for n, p in weights_of(model).items():
            torch.testing.assert_close(p.double(), wanted[n], atol=1e-5, rtol=1e-5)


@merging
def test_merge_linear_cat_svd__half_precision_and_no_values():
    model = bert().to(torch.bfloat16)
    randomly(model, gw.LoRA(r=2), "a", 1)
    randomly(model, gw.LoRA(r=3), "b", 2)
    made = gw.combine(model, "new", {"a": 0.3, "b": 0.7})
    assert {p.dtype for p in made.adapter.parameters()} == {torch.bfloat16}
    assert 1e-4 < made.error < 2**-7  # the factors are rounded, and the report says so
    with torch.device("meta"):
        empty = bert()
    gw.graft(empty, gw.LoRA(r=2), "a", head=False)
    with pytest.raises(GraftError, match="meta device"):
        gw.combine(empty, "new", {"a": 1.0})


@merging
def test_merge_linear_cat_svd__slices_of_a_packed_weight():
    """One adapter on q and v of a packed projection, one on the whole: the whole is what both have in common."""
    model = gpt2()
    randomly(model, gw.LoRA(r=2, at="q, v"), "a", 1)
    randomly(model, gw.LoRA(r=3, at="qkv"), "b", 2)
    key = "transformer.h.1.attn.c_attn:qkv"
    wanted = 0.5 * change(model, "a", key) + change(model, "b", key)
    made = gw.combine(model, "new", {"a": 0.5, "b": 1.0})
    assert {f.site for f in made.sites} == {key, "transformer.h.0.attn.c_attn:qkv"}
    assert relative(change(model, "new", key), wanted) < 1e-5


@merging
def test_merge_linear_cat_svd__svd_at_full_rank_is_cat_and_its_error_is_what_was_dropped():
    model = three()
    full = gw.combine(model, "full", SIGNED, "svd", r=10)
    assert full.error < 1e-6
    cut = gw.combine(model, "cut", SIGNED, "svd", r=4)
    for fit in cut.sites:
        dense = target(model, SIGNED, fit.site)
        s = torch.linalg.svdvals(dense)  # the dense route
        left = s[4:].square().sum().sqrt()
        assert fit.r == 4
        assert fit.error == pytest.approx(float(left / s.norm()), rel=1e-5)
        lost = (dense - by_formula(model, "cut", fit.site)).norm()
        assert float(lost) == pytest.approx(float(left), rel=1e-5)
    # the largest of the ranks is the default
    assert {f.r for f in gw.combine(model, "default", {"a": 1.0, "b": 1.0}, "svd").sites} == {5}
    # as few as keep the share that is asked for
    some = gw.combine(model, "some", SIGNED, "svd", energy=0.9)
    for fit in some.sites:
        s2 = torch.linalg.svdvals(target(model, SIGNED, fit.site)).square()
        share = s2.cumsum(0) / s2.sum()
        assert fit.r == int((share < 0.9).sum()) + 1
        assert fit.energy >= 0.9


@merging
def test_merge_linear_cat_svd__linear():
    model = bert()
    randomly(model, gw.LoRA(r=3, alpha=2.0), "a", 1)
    randomly(model, gw.LoRA(r=3, alpha=5.0, rslora=True), "b", 2)
    key = "bert.encoder.layer.0.attention.self.query:q"
    # one adapter: exact, of either sign
    for w in (0.7, -0.7):
        assert gw.combine(model, f"one{w}", {"b": w}, "linear").error < 1e-6
        assert relative(change(model, f"one{w}", key), w * by_formula(model, "b", key)) < 1e-5
    # several: the formula, whose cross terms the error counts
    made = gw.combine(model, "new", {"a": 0.5, "b": -2.0}, "linear")
    a, b = (gw.adapters(model)[n].parts[0].deltas[key] for n in "ab")
    p, q = math.sqrt(0.5 * a.scale), math.sqrt(2.0 * b.scale)
    by_hand = (p * a.up + q * b.up) @ (p * a.down - q * b.down)
    assert relative(change(model, "new", key), by_hand.detach()) < 1e-5
    wanted = target(model, {"a": 0.5, "b": -2.0}, key)
    fit = next(f for f in made.sites if f.site == key)
    assert fit.error == pytest.approx(relative(by_hand.detach(), wanted), rel=1e-4)
    assert fit.error > 0.3


@merging
def test_merge_linear_cat_svd__linear_b_is_exact_where_a_is_shared():
    model = bert()
    randomly(model, gw.LoRA(r=3, alpha=2.0), "a", 1)
    randomly(model, gw.LoRA(r=3, alpha=5.0), "b", 2)
    with pytest.raises(GraftError, match="factors A that differ"):
        gw.combine(model, "new", {"a": 0.5, "b": -2.0}, "linear_b")
    for one, other in zip(*(gw.adapters(model)[n].deltas() for n in "ab"), strict=True):
        other.down.data = one.down.data.clone()
    made = gw.combine(model, "new", {"a": 0.5, "b": -2.0}, "linear_b")
    assert made.error < 1e-6
    assert {f.r for f in made.sites} == {3}
    for key in keys(model, "a"):
        assert relative(change(model, "new", key), target(model, {"a": 0.5, "b": -2.0}, key)) < 1e-5


@merging
def test_merge_linear_cat_svd__the_backbone_and_the_inputs_keep_their_bits():
    model = three()
    weights = weights_of(model)
    inputs = {n: {k: t.clone() for k, t in gw.adapters(model)[n].state_dict().items()} for n in "abc"}
    for how in ("cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        gw.combine(model, how, SIGNED, how)
    gw.combine(model, "slerp", {"a": 0.5, "b": 0.5}, "slerp")
    assert all(torch.equal(weights[n], p) for n, p in weights_of(model).items())
    for n, tensors in inputs.items():
        assert all(torch.equal(tensors[k], t) for k, t in gw.adapters(model)[n].state_dict().items())


@merging
def test_merge_linear_cat_svd__dora_is_merged_by_what_it_does_to_the_weight():
    model, x = bert(), ids()
    randomly(model, gw.DoRA(r=2, at="q, up"), "dora", 1, std=0.05, around=True)
    randomly(model, gw.LoRA(r=3, at="q"), "lora", 2)
    q, up = (keys(model, "dora")[0], keys(model, "dora")[2])
    wanted = {q: change(model, "dora", q) + 2 * change(model, "lora", q), up: change(model, "dora", up)}
    with pytest.raises(GraftError, match="larger than the weight"):
        gw.combine(model, "new", {"dora": 1.0, "lora": 2.0})
    assert "new" not in gw.adapters(model)
    made = gw.combine(model, "new", {"dora": 1.0, "lora": 2.0}, "svd", r=32)
    assert made.error < 1e-6
    for key in (q, up):
        assert relative(change(model, "new", key), wanted[key]) < 1e-4
    # alone, at full rank, it computes the same
    gw.combine(model, "twin", {"dora": 1.0}, "svd", r=32)
    with torch.no_grad():
        twin = model(x).logits
        gw.activate(model, "dora")
        torch.testing.assert_close(twin, model(x).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(GraftError, match="not of low rank"):
        gw.combine(model, "other", {"dora": 1.0}, "svd")


@merging
def test_merge_linear_cat_svd__biases_and_norms_are_summed():
    model, x = bert(), ids()
    randomly(model, [gw.LoRA(r=2, at="q"), gw.BitFit(at="q, up"), gw.LNTuning()], "a", 1, std=0.1)
    randomly(model, [gw.IA3(at="k")], "b", 2, std=0.1, around=True)
    plain = weights_of(model)
    sums = dict(plain)
    for name, w in (("a", 0.5), ("b", -1.0)):
        gw.activate(model, name)
        gw.merge(model)
        sums = {n: sums[n] + w * (p - plain[n]) for n, p in weights_of(model).items()}
        gw.unmerge(model)
    gw.combine(model, "new", {"a": 0.5, "b": -1.0}, "svd", r=32)
    gw.merge(model)
    for n, p in weights_of(model).items():
        torch.testing.assert_close(p, sums[n], atol=1e-5, rtol=1e-4)
    assert model(x).logits.isfinite().all()


@merging
def test_merge_linear_cat_svd__heads():
    model = bert()
    for name, seed in (("a", 1), ("b", 2)):
        adapter = gw.graft(model, gw.LoRA(r=2), name, head=True, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for p in adapter.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    head = {n: gw.adapters(model)[n].state_dict()["1/classifier:head/values.weight"] for n in "ab"}
    plain = model.classifier.weight.detach()
    gw.combine(model, "mean", {"a": 0.5, "b": 0.5})
    gw.combine(model, "difference", {"a": 1.0, "b": -1.0})
    gw.combine(model, "own", {"a": 1.0, "b": -1.0}, head="a")
    for name, wanted in (
        ("mean", (head["a"] + head["b"]) / 2),
        ("difference", plain + head["a"] - head["b"]),
        ("own", head["a"]),
    ):
        got = gw.adapters(model)[name].state_dict()["1/classifier:head/values.weight"]
        torch.testing.assert_close(got, wanted)
    gw.adapters(model)["a"].labels, gw.adapters(model)["b"].labels = ("x", "y"), ("u", "v")
    with pytest.raises(GraftError, match="heads for different labels"):
        gw.combine(model, "new", {"a": 0.5, "b": 0.5})
    assert gw.combine(model, "new", {"a": 0.5, "b": 0.5}, head="b").adapter.labels == ("u", "v")


@merging
def test_merge_linear_cat_svd__the_result_saves_loads_and_merges(tmp_path):
    model, x = three(), ids()
    gw.combine(model, "new", SIGNED)
    with torch.no_grad():
        out = model(x).logits
        gw.save(model, "new", tmp_path / "new")
        gw.merge(model)
        torch.testing.assert_close(model(x).logits, out, atol=1e-5, rtol=1e-5)
        again = bert()
        loaded = gw.load(again, tmp_path / "new")
        assert torch.equal(again(x).logits, out)
    assert {m.name for m in loaded.methods} == {"lora"}
    assert loaded.metadata["composed"]["of"] == SIGNED


@merging
def test_merge_linear_cat_svd__slerp():
    model = bert()
    randomly(model, gw.LoRA(r=2, at="up"), "a", 1)
    randomly(model, gw.LoRA(r=4, at="up"), "b", 2)
    key = keys(model, "a")[0]
    a, b = (by_formula(model, n, key) for n in "ab")
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    for i, t in enumerate((0.0, 0.25, 1.0)):
        made = gw.combine(model, f"s{i}", {"a": 1 - t, "b": t}, "slerp")
        assert made.error < 1e-6
        wanted = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        assert relative(change(model, f"s{i}", key), wanted) < 1e-5
    # of two of one length it keeps the length, which the mean does not
    unit = {n: d / d.norm() for n, d in (("a", a), ("b", b))}
    for n in "ab":
        gw.adapters(model)[n].parts[0].deltas[key].up.data /= float(by_formula(model, n, key).norm())
    gw.combine(model, "half", {"a": 0.5, "b": 0.5}, "slerp")
    assert float(change(model, "half", key).norm()) == pytest.approx(1.0, rel=1e-4)
    assert float(((unit["a"] + unit["b"]) / 2).norm()) < 0.8
    # parallel: no arc, the straight line
    gw.scale(model, "twice", "a", 2.0)
    gw.combine(model, "line", {"a": 0.5, "twice": 0.5}, "slerp")
    assert relative(change(model, "line", key), 1.5 * unit["a"]) < 1e-5


# --- beside HF PEFT ---------------------------------------------------------------------------------------------------


def pair(ranks=(3, 3), alphas=(2.0, 5.0), rslora=False):
    """The same two LoRAs on the same layers, in graftwork and in HF PEFT."""
    peft = pytest.importorskip("peft")

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.square, self.oblong = nn.Linear(12, 12), nn.Linear(12, 7)

        def forward(self, x):
            return self.oblong(torch.tanh(self.square(x)))

    torch.manual_seed(0)
    ours = Two().eval()
    theirs = Two().eval()
    theirs.load_state_dict(ours.state_dict())
    wrapped = None
    for name, r, alpha, seed in zip("ab", ranks, alphas, (1, 2), strict=True):
        adapter = randomly(ours, gw.LoRA(r=r, alpha=alpha, rslora=rslora, at="/square|oblong/"), name, seed)
        config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=["square", "oblong"])
        if wrapped is None:
            wrapped = peft.get_peft_model(theirs, config, name)
        else:
            wrapped.add_adapter(name, config)
        for layer in ("square", "oblong"):
            module = getattr(wrapped.base_model.model, layer)
            delta = next(d for k, d in adapter.parts[0].deltas.items() if k.startswith(layer))
            module.lora_A[name].weight.data = delta.down.data.clone()
            module.lora_B[name].weight.data = delta.up.data.clone()
    return ours, wrapped


def both(ours, theirs, ours_name, theirs_name="new"):
    """{layer: (ours, theirs)} of the changes of the two weights."""
    out = {}
    for layer in ("square", "oblong"):
        key = next(k for k in keys(ours, "a") if k.startswith(layer))
        their = getattr(theirs.base_model.model, layer).get_delta_weight(theirs_name).detach()
        out[layer] = (change(ours, ours_name, key), their.double())
    return out


@merging
@pytest.mark.parametrize(
    ("how", "theirs_is", "weights"),
    [
        ("cat", "cat", (0.5, 0.5)),
        ("cat", "cat", (0.3, -1.1)),
        ("svd", "svd", (0.5, 0.5)),
        ("svd", "svd", (0.3, -1.1)),
        ("linear", "linear", (0.5, 0.5)),
        ("linear", "linear", (0.3, -1.1)),
        ("ties", "ties_svd", (1.0, 1.0)),
        ("magnitude_prune", "magnitude_prune_svd", (0.3, -1.1)),
    ],
)
def test_merge_linear_cat_svd__equals_peft(how, theirs_is, weights):
    """Where PEFT is right: no rsLoRA, equal weights for the election, a density without rounding."""
    ours, theirs = pair(ranks=(3, 3) if how == "linear" else (2, 4))
    density = {"density": 0.5} if theirs_is.startswith(("ties", "magnitude")) else {}
    theirs.add_weighted_adapter(["a", "b"], list(weights), "new", combination_type=theirs_is, **density)
    gw.combine(ours, "new", dict(zip("ab", weights, strict=True)), how, **density)
    for mine, peer in both(ours, theirs, "new").values():
        assert relative(mine, peer) < 1e-5


@merging
def test_merge_linear_cat_svd__where_peft_is_wrong_with_rslora():
    """The config of the first adapter is copied, rsLoRA too, so that PEFT's result is sqrt(r) of the new rank too large."""
    ours, theirs = pair(ranks=(2, 2), rslora=True)
    theirs.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", combination_type="cat")
    gw.combine(ours, "new", {"a": 0.5, "b": 0.5}, "cat")
    for layer, (mine, peer) in both(ours, theirs, "new").items():
        key = next(k for k in keys(ours, "a") if k.startswith(layer))
        wanted = target(ours, {"a": 0.5, "b": 0.5}, key)
        assert relative(mine, wanted) < 1e-6
        assert relative(peer, wanted) == pytest.approx(math.sqrt(4) - 1, abs=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------


@merging
@pytest.mark.parametrize(
    ("weights", "how", "options", "text"),
    [
        ({"a": 1.0, "x": 1.0}, "cat", {}, "the adapter 'x'"),
        ({}, "cat", {}, "no adapters"),
        (["a", "b"], "cat", {}, "no adapters with weights"),
        (None, "cat", {}, "no adapters with weights"),
        ({"a": float("nan")}, "cat", {}, "finite number"),
        ({"a": float("inf")}, "cat", {}, "finite number"),
        ({"a": "0.5"}, "cat", {}, "finite number"),
        ({"a": True}, "cat", {}, "finite number"),
        ({"a": 1.0}, "tie", {}, "did you mean 'ties'"),
        ({"a": 1.0}, "cat", {"r": 4}, "no effect on 'cat'"),
        ({"a": 1.0}, "svd", {"r": 0}, "r=0"),
        ({"a": 1.0}, "svd", {"r": 2.5}, "r=2.5"),
        ({"a": 1.0}, "svd", {"energy": 1.5}, "energy=1.5"),
        ({"a": 1.0}, "svd", {"density": 0.5}, "no effect on 'svd'"),
        ({"a": 1.0}, "ties", {"density": 0.0}, "density=0.0"),
        ({"a": 1.0}, "ties", {"density": 1.1}, "density=1.1"),
        ({"a": 1.0}, "ties", {"density": float("nan")}, "density=nan"),
        ({"a": 1.0}, "ties", {"majority": "most"}, "majority='most'"),
        ({"a": 1.0}, "dare_ties", {"density": 0.0}, "density=0.0"),
        ({"a": 1.0, "b": 1.0}, "slerp", {}, "t in \\[0, 1\\]"),
        ({"a": 1.0}, "slerp", {}, "t in \\[0, 1\\]"),
        ({"a": 0.5, "b": 0.5}, "linear", {}, "a has r=2, b has r=5"),
        ({"a": 0.5, "soft": 0.5}, "cat", {}, "changes activations, not a weight"),
        ({"a": 0.5, "b": 0.5}, "cat", {"head": "a"}, "which has no head"),
    ],
)
def test_merge_linear_cat_svd__bad_input(weights, how, options, text):
    model = three()
    randomly(model, gw.Bottleneck(d=4), "soft", 4)
    gw.activate(model, "a")
    before, names = weights_of(model), list(gw.adapters(model))
    with pytest.raises(GraftError, match=text) as caught:
        gw.combine(model, "new", weights, how, **options)
    assert caught.value.do
    assert list(gw.adapters(model)) == names
    assert gw.active(model) == "a"
    assert all(torch.equal(before[n], p) for n, p in weights_of(model).items())


@merging
def test_merge_linear_cat_svd__a_name_that_is_taken_or_a_merged_model():
    model = three()
    with pytest.raises(GraftError, match="the model has one"):
        gw.combine(model, "a", {"a": 1.0, "b": 1.0})
    gw.activate(model, "a")
    gw.merge(model)
    with pytest.raises(GraftError, match="merged into the weights"):
        gw.combine(model, "new", {"a": 1.0, "b": 1.0})
