"""Zhang et al. 2023: addition, negation and analogy of adapters by their own tensors."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids
from value_models import by_formula, change, keys, randomly, relative

import graftwork as gw
from graftwork.core.errors import GraftError

pem = pytest.mark.system("pem-arithmetic")
METHODS = {
    "lora": gw.LoRA(r=3, alpha=2.0, at="q, up"),
    "ia3": gw.IA3(),
    "bottleneck": gw.Bottleneck(d=4),
    "normed": gw.Bottleneck(d=4, norm="after"),
    "bitfit": gw.BitFit(),
}


def loaded(method, names="abc"):
    model = bert()
    for seed, name in enumerate(names, 1):
        randomly(model, method, name, seed, around=True)
    return model


def tensors(model, name):
    return gw.adapters(model)[name].state_dict()


@pem
@pytest.mark.parametrize("kind", METHODS)
def test_pem_arithmetic__add_to_itself_and_negate_twice(kind):
    model, x = loaded(METHODS[kind], "a"), ids()
    gw.scale(model, "same", "a", 1.0)
    for lam in (0.5, 0.3):
        gw.arithmetic(model, f"add{lam}", {"a": lam, "same": 1 - lam})
        for n, t in tensors(model, "a").items():
            torch.testing.assert_close(tensors(model, f"add{lam}")[n], t, atol=1e-7, rtol=1e-6)
    gw.scale(model, "minus", "a", -1.0)
    gw.scale(model, "again", "minus", -1.0)
    exact = kind != "ia3"  # 2 - (2 - l) rounds
    for n, t in tensors(model, "a").items():
        torch.testing.assert_close(tensors(model, "again")[n], t, atol=0 if exact else 1e-7, rtol=0)
    assert not all(torch.equal(t, tensors(model, "minus")[n]) for n, t in tensors(model, "a").items())
    # half of the effect is half of the effect, at one site
    gw.scale(model, "half", "a", 0.5)
    if kind in ("bottleneck", "normed"):
        h = torch.randn(3, 32)
        with torch.no_grad():
            for name, factor in (("minus", -1.0), ("half", 0.5)):
                pairs = zip(gw.adapters(model)["a"].deltas(), gw.adapters(model)[name].deltas(), strict=True)
                for one, other in pairs:
                    torch.testing.assert_close(other.branch(h), factor * one.branch(h), atol=1e-6, rtol=1e-5)
    assert model(x).logits.isfinite().all()


@pem
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_pem_arithmetic__negation_negates_the_change(kind):
    model = loaded(METHODS[kind], "a")
    gw.scale(model, "minus", "a", -1.0)
    gw.scale(model, "part", "a", -0.3)
    for key in keys(model, "a"):
        assert relative(change(model, "minus", key), -change(model, "a", key)) < 1e-5
        assert relative(change(model, "part", key), -0.3 * change(model, "a", key)) < 1e-5
    if kind == "lora":
        for n, t in tensors(model, "minus").items():
            assert torch.equal(t, tensors(model, "a")[n] * (-1 if n.endswith("up") else 1))
    else:
        for n, t in tensors(model, "minus").items():
            torch.testing.assert_close(t, 2 - tensors(model, "a")[n])


@pem
def test_pem_arithmetic__ia3_identity_and_analogy():
    model = bert()
    gw.graft(model, gw.IA3(), "one", head=False)
    gw.scale(model, "minus", "one", -1.0)
    assert all(torch.equal(t, torch.ones_like(t)) for t in tensors(model, "minus").values())
    model = loaded(METHODS["ia3"], "ab")
    gw.scale(model, "c", "b", 1.0)  # theta_1 = theta_2
    gw.arithmetic(model, "analogy", {"a": 0.4, "b": 0.6, "c": -0.6})
    for n, t in tensors(model, "analogy").items():
        torch.testing.assert_close(t - 1, 0.4 * (tensors(model, "a")[n] - 1), atol=1e-6, rtol=1e-5)
    model = loaded(METHODS["ia3"], "abc")
    gw.arithmetic(model, "analogy", {"a": 0.4, "b": 0.6, "c": -0.6})
    for n, t in tensors(model, "analogy").items():
        l0, l1, l2 = (tensors(model, x)[n] for x in "abc")
        torch.testing.assert_close(t, 1 - 0.4 + 0.4 * l0 + 0.6 * l1 - 0.6 * l2, atol=1e-6, rtol=1e-5)


@pem
def test_pem_arithmetic__lora_analogy_has_a_cross_term():
    model = loaded(METHODS["lora"], "ab")
    gw.scale(model, "c", "b", 1.0)
    gw.arithmetic(model, "analogy", {"a": 0.4, "b": 0.6, "c": -0.6})
    for key in keys(model, "a"):
        a, b = (gw.adapters(model)[n].parts[0].deltas[key] for n in "ab")
        wanted = a.scale * (0.4 * a.up) @ (0.4 * a.down + 2 * 0.6 * b.down)
        assert relative(change(model, "analogy", key), wanted.detach()) < 1e-5
        assert relative(change(model, "analogy", key), 0.4 * by_formula(model, "a", key)) > 0.5


@pem
def test_pem_arithmetic__the_two_spaces_differ_by_the_cross_terms():
    model, lam = loaded(METHODS["lora"], "ab"), 0.3
    gw.arithmetic(model, "factors", {"a": lam, "b": 1 - lam})
    gw.combine(model, "changes", {"a": lam, "b": 1 - lam}, "svd", r=6)
    for key in keys(model, "a"):
        a, b = (gw.adapters(model)[n].parts[0].deltas[key] for n in "ab")
        down = {x: d.down.detach().double() for x, d in (("a", a), ("b", b))}
        up = {x: d.up.detach().double() for x, d in (("a", a), ("b", b))}
        # (lam B1 + mu B2)(lam A1 + mu A2) - lam B1 A1 - mu B2 A2 with lam + mu = 1
        cross = -a.scale * lam * (1 - lam) * (up["a"] - up["b"]) @ (down["a"] - down["b"])
        difference = change(model, "factors", key) - change(model, "changes", key)
        assert relative(difference, cross) < 1e-4
        assert float(cross.norm()) > 0.1 * float(change(model, "changes", key).norm())


@pem
def test_pem_arithmetic__factors_must_be_alike():
    model = bert()
    randomly(model, gw.LoRA(r=2, at="q, v"), "a", 1)
    randomly(model, gw.LoRA(r=3, at="q, v"), "rank", 2)
    randomly(model, gw.LoRA(r=2, at="q, up"), "sites", 3)
    randomly(model, gw.LoRA(r=2, alpha=1.0, at="q, v"), "alpha", 4)
    randomly(model, gw.IA3(), "method", 5)
    randomly(model, gw.Prefix(length=3), "prefix", 6)
    names = list(gw.adapters(model))
    for other in ("rank", "sites", "alpha", "method"):
        for verb in (gw.arithmetic, gw.average):
            with pytest.raises(GraftError, match=r"other sites|is lora") as caught:
                verb(model, "new", {"a": 0.5, other: 0.5})
            assert "gw.combine" in caught.value.do
    with pytest.raises(GraftError, match="proportional to none of its tensors"):
        gw.scale(model, "new", "prefix", -1.0)
    with pytest.raises(GraftError, match="finite number"):
        gw.scale(model, "new", "a", float("nan"))
    with pytest.raises(GraftError, match="no adapters"):
        gw.arithmetic(model, "new", {})
    assert list(gw.adapters(model)) == names


@pem
def test_pem_arithmetic__heads_are_averaged(tmp_path):
    model, x = bert(), ids()
    for seed, name in enumerate("abc", 1):
        adapter = gw.graft(model, gw.LoRA(r=2), name, head=True)
        generator = torch.Generator().manual_seed(seed)
        for p in adapter.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    gw.arithmetic(model, "new", {"a": 0.5, "b": 0.25, "c": -0.25})
    name = "1/classifier:head/values.weight"
    a, b, c = (tensors(model, n)[name] for n in "abc")
    torch.testing.assert_close(tensors(model, "new")[name], 0.5 * a + 0.25 * b + 0.25 * c)
    gw.save(model, "new", tmp_path / "new")
    again = bert()
    gw.load(again, tmp_path / "new")
    assert torch.equal(again(x).logits, model(x).logits)
