"""Kopiczko et al. 2023: one frozen random pair of matrices for all sites, two vectors per site."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from adapter_models import bert, ids, llama, spread
from safetensors.torch import load_file
from torch import nn
from weight_models import around, counts, gpt2, mixtral, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("vera")

DRAW = """
import hashlib, torch, graftwork as gw
torch.set_num_threads(2)
torch.randn(17)
model = torch.nn.Sequential(torch.nn.Linear(9, 13), torch.nn.Linear(13, 4)).to(torch.float32)
adapter = gw.graft(model, gw.VeRA(r=6, seed=3, at="linear, head"), head=False)
delta = next(adapter.deltas())
print(hashlib.sha256(delta.down.numpy().tobytes() + delta.up.contiguous().numpy().tobytes()).hexdigest())
"""


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_vera__one_storage_for_all_sites_that_nobody_trains():
    model = llama()
    adapter = gw.graft(model, gw.VeRA(r=16, at="q, v, down"), head=False)
    deltas = list(adapter.deltas())
    assert len({d.down.data_ptr() for d in deltas}) == 1
    assert len({d.up.data_ptr() for d in deltas}) == 1
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert {p.data_ptr() for d in deltas for p in (d.down_scale, d.up_scale)} == trained
    again = copy.deepcopy(model)
    shared = {d.down.data_ptr() for d in gw.adapters(again)["default"].deltas()}
    assert len(shared) == 1
    assert shared != {deltas[0].down.data_ptr()}


def test_vera__regenerated_to_the_bit_from_the_seed(tmp_path):
    model, x = bert(), ids()
    adapter = gw.graft(model, gw.VeRA(r=16, seed=5), "a", head=False)
    spread(adapter)
    (delta, *_) = adapter.deltas()
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert sum(t.numel() for t in stored.values()) == adapter.num_parameters
    again = bert()
    torch.manual_seed(99)
    (loaded, *_) = gw.load(again, tmp_path / "a").deltas()
    assert torch.equal(loaded.down, delta.down)
    assert torch.equal(loaded.up, delta.up)
    assert torch.equal(again(x).logits, out)
    (other, *_) = gw.graft(bert(), gw.VeRA(r=16, seed=6), head=False).deltas()
    assert not torch.equal(other.down, delta.down)


def test_vera__the_projection_can_be_stored(tmp_path):
    model = bert()
    adapter = gw.graft(model, gw.VeRA(r=16, save_projection=True), "a", head=False)
    projection = adapter.parts[0].shared_modules["projection"]
    projection.down.normal_()  # another version's draw
    spread(adapter)
    out = model(ids()).logits
    gw.save(model, "a", tmp_path / "a")
    again = bert()
    gw.load(again, tmp_path / "a")
    assert torch.equal(again(ids()).logits, out)


def test_vera__the_draw_does_not_depend_on_the_process():
    digests = {subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64
    # nor does it move torch's own generator
    model = around(nn.Linear(9, 13))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    gw.graft(model, gw.VeRA(r=6, at="linear"), head=False, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_vera__kaiming_bounds():
    adapter = gw.graft(around(nn.Linear(400, 300)), gw.VeRA(r=100, at="linear"), head=False)
    (delta,) = adapter.deltas()
    for t, fan in ((delta.down, 400), (delta.up, 100)):
        bound = (6 / fan) ** 0.5
        assert t.abs().max() <= bound
        assert t.abs().max() > 0.99 * bound
        assert t.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert torch.equal(delta.down_scale, torch.full((100,), 0.1))


def test_vera__counts():
    assert counts(roberta_of("base"), gw.VeRA(r=1024)) == (43_008, 43_008)
    assert counts(roberta_of("large"), gw.VeRA(r=256)) == (61_440, 61_440)


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_vera__identity_and_first_gradients(make):
    model, x = make(), ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.VeRA(r=16), head=False)
    assert torch.equal(model(x).logits, before)
    model(x).logits.square().mean().backward()
    for delta in adapter.deltas():
        assert torch.equal(delta.down_scale.grad, torch.zeros(16))
        assert delta.up_scale.grad.abs().max() > 0


@pytest.mark.parametrize("make", [bert, gpt2])
def test_vera__unit_vectors_equal_lora_with_the_same_pair(make):
    model, other, x = make(), make(), ids()
    vera = gw.graft(model, gw.VeRA(r=6), head=False)
    lora = gw.graft(other, gw.LoRA(r=6, alpha=6.0), head=False)
    for mine, theirs in zip(vera.deltas(), lora.deltas(), strict=True):
        nn.init.ones_(mine.down_scale)
        nn.init.ones_(mine.up_scale)
        theirs.down.data, theirs.up.data = mine.down.clone(), mine.up.clone()
    close(model(x).logits, other(x).logits)


@pytest.mark.parametrize("make", [bert, llama, gpt2, mixtral])
def test_vera__merge_equals_forward(make):
    model, x = make(), ids()
    at = "expert.gate_up, expert.down" if make is mixtral else "linear"
    spread(gw.graft(model, gw.VeRA(r=8, at=at), head=False))
    with torch.no_grad():
        out = model(x).logits
        gw.merge(model)
        close(model(x).logits, out, 1e-4)


def test_vera__two_widths_share_the_leading_rows_and_columns():
    """Sites of several shapes take slices of one pair; the order in which they come changes nothing."""
    torch.manual_seed(0)
    wide, tall = nn.Linear(9, 4), nn.Linear(4, 13)

    def pair(order):
        model = nn.ModuleDict({name: copy.deepcopy({"wide": wide, "tall": tall}[name]) for name in order})
        adapter = gw.graft(model, gw.VeRA(r=6, at="/wide|tall/"), head=False)
        return {key.split(":")[0]: delta for key, delta in adapter.parts[0].deltas.items()}

    one, two = pair(["wide", "tall"]), pair(["tall", "wide"])
    whole = one["wide"]._shared[0]
    assert whole.down.shape == (6, 9)
    assert whole.up.shape == (13, 6)
    assert torch.equal(one["tall"].down, whole.down[:, :4])
    assert torch.equal(one["wide"].up, whole.up[:4])
    for name in ("wide", "tall"):
        assert torch.equal(one[name].down, two[name].down)
        assert torch.equal(one[name].up, two[name].up)
        for delta in (one[name], two[name]):
            nn.init.ones_(delta.up_scale)
        w = {"wide": wide, "tall": tall}[name].weight
        assert torch.equal(one[name].weight(w), two[name].weight(w))
        assert not torch.equal(one[name].weight(w), w)
