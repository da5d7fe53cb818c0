"""LyCORIS: the Kronecker product of a small matrix and a larger one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapter_models import llama_of, spread
from safetensors.torch import save_file
from torch import nn
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.forms.kronecker import factorized, kronecker_linear, kronecker_sum

pytestmark = pytest.mark.system("lokr")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(site, std=0.3, **options):
    """One layer with LoKr: the model, its delta."""
    torch.manual_seed(0)
    model = around(site)
    adapter = gw.graft(model, gw.LoKr(at="/site/", **options), head=False)
    spread(adapter, std)
    (delta,) = adapter.deltas()
    return model, delta


def change(model, delta):
    w = model.site.weight.detach()
    return (delta.weight(w.flatten(1)) - w.flatten(1)).detach().reshape(w.shape)


CASES = {
    "linear": (lambda: nn.Linear(24, 16), {"r": 8}),
    "linear of low rank": (lambda: nn.Linear(64, 48), {"r": 2, "decompose_both": True}),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), {"r": 8}),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2)), {"r": 8}),
    "conv2d of low rank": (lambda: nn.Conv2d(12, 18, 3), {"r": 1}),
    "conv2d in groups": (lambda: nn.Conv2d(12, 18, 3, groups=2), {"r": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_lokr__equals_numpy(case):
    make, options = CASES[case]
    model, delta = layer(make(), alpha=3.0, **options)
    w1, w2 = delta.left.matrix().detach().numpy(), delta.right.matrix().detach().numpy()
    kernel = model.site.weight.shape[2:]
    left = w1.reshape(*w1.shape, *(1 for _ in kernel))
    right = w2.reshape(w2.shape[0], -1, *kernel)
    expected = 3.0 / options["r"] * np.kron(left, right)
    assert expected.shape == tuple(model.site.weight.shape)
    close(change(model, delta), torch.from_numpy(expected))


@pytest.mark.parametrize("shapes", [((3, 4), (5, 2)), ((1, 6), (7, 3)), ((4, 4), (4, 4)), ((5, 2), (1, 8))])
def test_lokr__the_product_that_is_not_formed(shapes):
    torch.manual_seed(0)
    for k in (1, 3):
        a, b = (torch.randn(k, *shape) for shape in shapes)
        dense = sum(torch.kron(a[i], b[i]) for i in range(k))
        close(kronecker_sum(a, b), dense, 1e-6)
        x = torch.randn(2, 3, dense.shape[1])
        close(kronecker_linear(x, a, b), x @ dense.T, 1e-5)


def test_lokr__both_paths_on_a_linear_layer():
    for d, thin in ((20, False), (256, True)):
        model, delta = layer(nn.Linear(d, d), r=2, std=0.1)
        assert (3 * delta.work() <= d * d) == thin
        x = torch.randn(4, 3, d)
        close(model(x), F.linear(x, model.site.weight, model.site.bias) + F.linear(x, change(model, delta)), 1e-5)


def test_lokr__factorization():
    assert factorized(256) == (16, 16)
    assert factorized(128) == (8, 16)
    assert factorized(127) == (1, 127)
    assert factorized(128, 4) == (4, 32)
    assert factorized(100, 7) == (5, 20)  # the largest divisor that is not above it
    assert factorized(128, 20) == (8, 16)
    assert factorized(128, 64) == (64, 2)  # it divides


def test_lokr__counts_and_ranks():
    both = nn.ModuleDict({"one": nn.Linear(16, 24), "two": nn.Linear(24, 16)})
    assert counts(both, gw.LoKr(r=1, at="/one|two/")) == (52, 52)
    assert counts(both, gw.LoKr(r=8, at="/one|two/")) == (80, 80)
    # 64 x 64 and 64 x 64, the second of rank 8, for q and v of LLaMA2-7B
    assert counts(llama_of(4096, 32, 32, 11008), gw.LoKr()) == (64 * (64 * 64 + 8 * 128),) * 2
    conv = nn.ModuleDict({"one": nn.Conv2d(12, 18, 3)})  # 18 = 3 * 6, 12 = 3 * 4
    assert counts(conv, gw.LoKr(r=1, at="/one/")) == (9 + 6 + 4 * 9,) * 2
    assert counts(conv, gw.LoKr(r=1, at="/one/", effective=True)) == (9 + 6 + 4 + 9,) * 2
    model, delta = layer(nn.Linear(64, 64), r=2, decompose_both=True)
    ranks = [int(torch.linalg.matrix_rank(m.matrix().detach(), rtol=1e-5)) for m in (delta.left, delta.right)]
    assert ranks == [2, 2]
    assert torch.linalg.matrix_rank(change(model, delta), rtol=1e-5) == 4


@pytest.mark.parametrize("init", ["zero", "lycoris"])
def test_lokr__identity_and_first_gradients(init):
    torch.manual_seed(0)
    model = around(nn.Linear(64, 64))
    x = torch.randn(3, 64)
    before = model(x)
    adapter = gw.graft(model, gw.LoKr(r=2, init=init, at="/site/"), head=False)
    (delta,) = adapter.deltas()
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    idle = {"zero": {"right.up", "right.down"}, "lycoris": {"left.whole", "right.up"}}[init]
    assert {n for n, p in delta.named_parameters() if not p.grad.any()} == idle


def test_lokr__rows_dropped_are_made_up_for_only_if_asked():
    for scaled in (False, True):
        model, _ = layer(nn.Linear(256, 4 * 64), r=2, rank_dropout=0.5, rank_dropout_scale=scaled, std=0.1)
        x = torch.randn(3, 256)
        base = F.linear(x, model.site.weight, model.site.bias)
        whole = model(x) - base
        edit = model.train()(x) - base
        kept = edit.abs().amax(0) > 0
        assert 64 < kept.sum() < 192
        close(edit, torch.where(kept, whole * (256 / kept.sum() if scaled else 1), 0.0), 1e-4)


def lycoris_file(path, tensors):
    save_file({f"lora_unet_site.{name}": t for name, t in tensors.items()}, path)
    return path


def test_lokr__a_lycoris_file_with_two_whole_matrices(tmp_path):
    """Its scale is 1, whatever alpha is."""
    torch.manual_seed(0)
    w1, w2 = torch.randn(4, 4), torch.randn(4, 6)
    file = lycoris_file(tmp_path / "a.safetensors", {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(4.0)})
    model = around(nn.Linear(24, 16))
    base = model.site.weight.detach().clone()
    (method,) = gw.load(model, file, "a").methods
    assert isinstance(method, gw.LoKr) and method.alpha / method.r == 1.0
    gw.merge(model)
    close(model.site.weight - base, torch.kron(w1, w2))


LYCORIS = {
    "low": (nn.Linear(60, 48), {"lokr_w1": (6, 6), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 10)}, 2),
    "both": (
        nn.Linear(60, 48),
        {"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 6), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 10)},
        2,
    ),
    "factor": (nn.Linear(60, 48), {"lokr_w1": (4, 4), "lokr_w2_a": (12, 3), "lokr_w2_b": (3, 15)}, 3),
    "kernel": (nn.Conv2d(12, 48, 3), {"lokr_w1": (6, 3), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 36)}, 2),
    "core": (
        nn.Conv2d(12, 48, 3),
        {"lokr_w1": (6, 3), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 8), "lokr_w2_b": (2, 4)},
        2,
    ),
    "conv1d": (nn.Conv1d(6, 8, 3), {"lokr_w1": (2, 2), "lokr_w2": (4, 3, 3)}, 0),
}


@pytest.mark.parametrize("case", LYCORIS)
def test_lokr__lycoris_files(case, tmp_path):
    """The rank and the way of dividing follow from the shapes."""
    site, shapes, r = LYCORIS[case]
    torch.manual_seed(0)
    t = {name: torch.randn(shape) for name, shape in shapes.items()}
    model = around(site)
    w = model.site.weight.detach().clone()
    gw.load(model, lycoris_file(tmp_path / "a.safetensors", {**t, "alpha": torch.tensor(1.0)}), "a")
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = torch.einsum("pqkl,po,qi->oikl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    expected = torch.kron(w1, w2.flatten(1)).reshape(w.shape) / (r or 1)
    gw.merge(model)
    close(model.site.weight - w, expected, 1e-4)
    gw.unmerge(model)
    gw.remove(model, "a")
    wrong = {**t, next(iter(t)): torch.randn(5, 5)}
    with pytest.raises(gw.GraftError):
        gw.load(model, lycoris_file(tmp_path / "b.safetensors", wrong), "b")
    assert not gw.adapters(model)


def test_lokr__what_a_file_lacks_is_named(tmp_path):
    model = around(nn.Linear(24, 16))
    file = lycoris_file(tmp_path / "a.safetensors", {"lokr_w1": torch.ones(4, 4)})
    with pytest.raises(gw.GraftError, match=r"lokr_w2_b"):
        gw.load(model, file)


def test_lokr__loha_files_of_lycoris(tmp_path):
    torch.manual_seed(0)
    t = {"hada_w1_a": (16, 3), "hada_w1_b": (3, 24), "hada_w2_a": (16, 3), "hada_w2_b": (3, 24)}
    t = {name: torch.randn(shape) for name, shape in t.items()}
    model = around(nn.Linear(24, 16))
    w = model.site.weight.detach().clone()
    gw.load(model, lycoris_file(tmp_path / "a.safetensors", {**t, "alpha": torch.tensor(6.0)}), "a")
    gw.merge(model)
    close(model.site.weight - w, 2 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]), 1e-4)
