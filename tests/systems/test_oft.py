"""Qiu et al. 2023 and 2025: the input of a weight is rotated by a block-diagonal orthogonal matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import ids, llama_of, spread
from peft import OFTConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from weight_models import around, counts, mixtral

import graftwork as gw
from graftwork.methods.weight.oft import OFT

pytestmark = pytest.mark.system("oft")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(d_in=8, d_out=12, std=0.3, **options):
    torch.manual_seed(0)
    model = around(nn.Linear(d_in, d_out))
    adapter = gw.graft(model, gw.OFT(at="linear", **options), head=False)
    spread(adapter, std)
    (delta,) = adapter.deltas()
    return model, delta, torch.randn(4, d_in)


def skew(delta):
    """Q_i [n, b, b], written out entry by entry."""
    b = delta.size
    out = torch.zeros(len(delta.q), b, b)
    for block, q in enumerate(delta.q.detach()):
        values = iter(q)
        for i in range(b):
            for j in range(i + 1, b):
                out[block, i, j] = value = next(values)
                out[block, j, i] = -value
    return out


def test_oft__exact_rotation_is_orthogonal_and_equals_the_definition():
    model, delta, x = layer(block_size=4, exact=True)
    q, eye = skew(delta), torch.eye(4)
    r = torch.block_diag(*((eye + block) @ torch.linalg.inv(eye - block) for block in q))
    close(r @ r.T, torch.eye(8), 1e-6)
    close(torch.block_diag(*delta.rotation()), r, 1e-6)
    close(model(x), F.linear(x @ r, model.site.weight, model.site.bias))
    close(delta.weight(model.site.weight), model.site.weight @ r.T)


def test_oft__series_and_inverse_turn_the_same_way():
    _, exact, _ = layer(block_size=4, exact=True)
    norm = skew(exact).norm(dim=(1, 2)).max()
    rotations = {}
    for t in range(1, 13):
        _, series, _ = layer(block_size=4, terms=t)
        series.q.data = exact.q.data * (0.05 / norm)
        rotations[t] = series.rotation()
    exact.q.data *= 0.05 / norm
    assert (exact.rotation() - rotations[12]).abs().max() < 1e-6
    assert (exact.rotation().mT - rotations[12]).abs().max() > 1e-2
    for t in range(1, 5):  # beyond, at this size, rounding hides the next power
        assert not torch.equal(rotations[t], rotations[t + 1])
        error, better = ((rotations[k] - exact.rotation()).norm() for k in (t, t + 1))
        assert better < 0.6 * error


@pytest.mark.parametrize("t", [1, 2, 3, 4, 5, 6])
def test_oft__series_is_written_out(t):
    _, delta, _ = layer(block_size=4, terms=t)
    q, eye = skew(delta), torch.eye(4)
    power = [torch.linalg.matrix_power(q, k) for k in range(t)]
    expected = eye + 2 * sum(power[1 : t - 1], torch.zeros(4, 4)) + (power[t - 1] if t > 1 else 0)
    close(delta.rotation(), expected.expand(2, 4, 4), 1e-6)


def test_oft__angles_between_neurons_are_preserved():
    model, delta, _ = layer(block_size=8, exact=True)
    w, new = model.site.weight, delta.weight(model.site.weight)
    close(new @ new.T, w @ w.T)
    assert (new - w).abs().max() > 0.1


@pytest.mark.parametrize("padding", [0, 1])
def test_oft__a_fresh_convolution_is_the_identity(padding):
    torch.manual_seed(0)
    model, x = around(nn.Conv2d(4, 6, 3, padding=padding)), torch.randn(2, 4, 8, 8)
    before = model(x)
    gw.graft(model, gw.OFT(block_size=4, at="/site/"), head=False)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_oft__merged_equals_unmerged(kind, share, exact):
    torch.manual_seed(0)
    site = {"linear": nn.Linear(8, 5), "conv": nn.Conv2d(4, 6, 3, padding=1), "embedding": nn.Embedding(11, 8)}[kind]
    model = around(site, nn.Linear(8, 3) if kind == "embedding" else None)
    adapter = gw.graft(model, gw.OFT(block_size=4, share=share, exact=exact, at="/site/"), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    x = {"linear": torch.randn(2, 8), "conv": torch.randn(2, 4, 8, 8), "embedding": torch.arange(11)}[kind]
    out, r = model(x), torch.block_diag(*delta.rotation())
    by_hand = {
        "linear": lambda: F.linear(x @ r, site.weight, site.bias),
        "conv": lambda: F.conv2d(x, (site.weight.flatten(1) @ r.T).view(6, 4, 3, 3), site.bias, padding=1),
        "embedding": lambda: model.last(site.weight @ r),
    }[kind]()
    close(out, by_hand)
    gw.merge(model)
    close(model(x), out)


def test_oft__experts():
    model, x = mixtral(), ids()
    spread(gw.graft(model, gw.OFT(block_size=8, at="expert.gate_up, expert.down"), head=False))
    out = model(x).logits
    gw.merge(model)
    close(model(x).logits, out)


@pytest.mark.parametrize("neumann", [True, False])
def test_oft__peft_direction(neumann, tmp_path):
    """PEFT turns the other way with its inverse than with its series: both files compute here what they do there."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 5)), torch.randn(3, 8)
    config = OFTConfig(oft_block_size=4, target_modules=["0"], use_cayley_neumann=neumann, init_weights=False)
    theirs = get_peft_model(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 5)), config).eval()
    site = theirs.base_model.model[0]
    site.base_layer.load_state_dict(net[0].state_dict())
    theirs.base_model.model[1].load_state_dict(net[1].state_dict())
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.0.oft_R.weight"]
    (delta,) = gw.load(net, tmp_path, "a").deltas()
    assert torch.equal(delta.q, stored if neumann else -stored)
    close(net(x), theirs(x))


@pytest.mark.parametrize("share", [False, True])
def test_oft__coft_is_held_at_the_bound_after_every_step(share):
    model, delta, x = layer(block_size=2, coft=True, eps=0.1, share=share, std=0.0)
    bound = 0.1 / (1 if share else 4) ** 0.5
    optimizer = torch.optim.SGD(delta.parameters(), lr=1.0)
    for step in range(5):
        (model(x) - 1).square().sum().backward()
        optimizer.step()
        gw.step(model, (step + 1) / 5)
        optimizer.zero_grad()
        assert skew(delta).norm(dim=(1, 2)).max() <= bound * (1 + 1e-5)
    assert skew(delta).norm(dim=(1, 2)).max() == pytest.approx(bound, rel=1e-4)  # it was pulled back
    delta.q.data += 3.0  # without a step, too
    used = delta.bounded().detach()
    assert (used.norm(dim=-1) * 2**0.5).max() <= bound * (1 + 1e-5)
    close(model(x), F.linear(x @ torch.block_diag(*delta.rotation()), model.site.weight, model.site.bias))


def test_oft__block_dropout_leaves_blocks_unrotated():
    model, delta, x = layer(16, 8, block_size=4, block_dropout=0.5)
    rotation, eye = delta.rotation(), torch.eye(4)
    x = torch.eye(16)
    model.train()
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        out = model(x) - model.site.bias
        mask = [
            torch.allclose(out[4 * i : 4 * i + 4], model.site.weight[:, 4 * i : 4 * i + 4].T, atol=1e-6)
            for i in range(4)
        ]
        assert sum(mask) == 2
        seen.add(tuple(mask))
        made = torch.block_diag(*(eye if off else r for off, r in zip(mask, rotation, strict=True)))
        close(out, made @ model.site.weight.T)
    assert len(seen) > 1
    model.eval()
    close(model(x) - model.site.bias, torch.block_diag(*rotation) @ model.site.weight.T)


def test_oft__the_nearest_divisor_is_taken():
    sizes = {(32, None): (4, 12), (7, None): (8, 6), (5, None): (12, 4), (None, 5): (4, 12), (60, None): (1, 48)}
    site = next(s for s in gw.anatomy(around(nn.Linear(48, 5))).sites if s.path == "site")
    for (b, n), expected in sizes.items():
        wanted = expected if (b, n) != (32, None) else (2, 24)
        assert OFT(**({"blocks": n} if n else {"block_size": b})).sizes(site.weight) == wanted
    model = around(nn.Linear(7, 5))
    with pytest.raises(gw.GraftError, match="blocks of one number"):
        gw.graft(model, gw.OFT(block_size=2, at="linear"), head=False)


def test_oft__counts():
    """in (b - 1) / 2 per weight; 60 on two layers of 20 with b = 4; q and v of LLaMA-7B with b = 32."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 5))
    assert gw.graft(model, gw.OFT(block_size=4, at="/[02]/"), head=False).num_parameters == 60
    big = llama_of(4096, 32, 32, 11008)
    number = 64 * (4096 * 31 // 2)
    assert counts(big, gw.OFT()) == (number, number)
    assert counts(big, gw.OFT(share=True)) == (64 * 496, 64 * 496)
