"""Kaushik et al. 2025: coordinates in the principal subspace of earlier LoRAs."""

from __future__ import annotations

import pytest
import torch
from adapter_models import ids, llama, spread
from started import by_site, close, train
from weight_models import counts, gpt2, mixtral, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("eigenlorax")
NAMES = ["a", "b", "c", "d"]


def sources(model, r=3, subspace=None, at="q, v", names=NAMES):
    """LoRAs with random factors; subspace: all of them in one of that rank at each site and side."""
    for seed, name in enumerate(names):
        adapter = gw.graft(model, gw.LoRA(r=r, alpha=5.0, at=at), name, head=False, seed=seed)
        spread(adapter)
        generator = torch.Generator().manual_seed(seed)
        for i, d in enumerate(adapter.deltas()):
            own = torch.Generator().manual_seed(100 + i)
            for p in (d.down, d.up):
                p.data = torch.randn(p.shape, generator=generator)
            if subspace:
                d.down.data = d.down.data[..., :subspace] @ torch.randn(subspace, d.down.shape[-1], generator=own)
                d.up.data = torch.randn(d.up.shape[-2], subspace, generator=own) @ d.up.data[..., :subspace, :]
    return model


@pytest.mark.parametrize("make", [llama, gpt2, mixtral])
def test_eigenlorax__a_common_subspace_gives_every_lora_back(make):
    at = "expert.gate_up, expert.down" if make is mixtral else "q, v"
    model, x = sources(make(), at=at, subspace=3), ids()
    gw.recycle(model, "basis", of=NAMES, k=3, extra=0)
    for name in NAMES:
        gw.project(model, "again", of=name, onto="basis")
        again = model(x).logits
        gw.activate(model, name)
        close(again, model(x).logits, 1e-4)
        for (w, one), (_, two) in zip(by_site(model, "again"), by_site(model, name), strict=True):
            wanted = two.weight(w) - w
            assert (one.weight(w) - w - wanted).norm() < 1e-5 * wanted.norm()
        gw.remove(model, "again")


def test_eigenlorax__orthonormal_with_what_is_added():
    model = sources(llama())
    before = model(ids()).logits
    bases = {}
    for extra in (0, 5):
        adapter = gw.recycle(model, f"basis{extra}", of=NAMES, k=7, extra=extra)
        with gw.using(model, None):
            bare = model(ids()).logits
        assert torch.equal(model(ids()).logits, bare)  # L_B = 0
        for d in adapter.deltas():
            eye = torch.eye(7 + extra)
            close(d.basis_down @ d.basis_down.T, eye)
            close(d.basis_up.T @ d.basis_up, eye)
        bases[extra] = [(d.basis_down, d.basis_up) for d in adapter.deltas()]
    for (down, up), (wider, taller) in zip(bases[0], bases[5], strict=True):
        assert torch.equal(down, wider[:7])
        assert torch.equal(up, taller[:, :7])
    gw.activate(model, "d")
    assert torch.equal(model(ids()).logits, before)


def test_eigenlorax__what_is_lost_is_the_mean():
    """All directions of the centred factors: what a source then lacks is its part along the mean, outside of their span."""
    model = sources(llama(), r=2, names=["a", "b"])
    gw.recycle(model, "basis", of=["a", "b"], k=3, extra=0)  # four columns less their mean span three directions
    for (_, basis), (_, a), (_, b) in zip(*(by_site(model, n) for n in ("basis", "a", "b")), strict=True):
        columns = torch.cat([a.down, b.down]).T
        p = basis.basis_down.T
        residual = columns - p @ (p.T @ columns)
        mean = columns.mean(1)
        close(residual, (mean - p @ (p.T @ mean))[:, None].expand_as(columns), 1e-5)
        assert residual.abs().max() > 0.01
    with pytest.raises(gw.GraftError, match="fewer than k=4"):
        gw.recycle(model, "more", of=["a", "b"], k=4, extra=0)
    assert "more" not in gw.adapters(model)


def test_eigenlorax__frozen_bases_and_projection(tmp_path):
    model, x = sources(llama()), ids()
    adapter = gw.recycle(model, "basis", of=NAMES[:3], r=4, k=6, extra=2)
    assert adapter.num_parameters == 4 * 2 * 8 * 4
    start = [(d.basis_down.clone(), d.basis_up.clone()) for d in adapter.deltas()]
    train(model, x)
    for d, (down, up) in zip(adapter.deltas(), start, strict=True):
        assert torch.equal(d.basis_down, down) and torch.equal(d.basis_up, up)
        assert d.up.abs().max() > 0
    projected = gw.project(model, "projected", of="d", onto="basis")
    for (w, mine), (_, theirs), (_, basis) in zip(
        *(by_site(model, n) for n in ("projected", "d", "basis")), strict=True
    ):
        assert mine.basis_down is basis.basis_down  # one subspace in memory
        p, q = basis.basis_up @ basis.basis_up.T, basis.basis_down.T @ basis.basis_down
        close(mine.weight(w) - w, p @ (theirs.weight(w) - w) @ q, 1e-4)
    out = model(x).logits
    gw.save(model, "projected", tmp_path)
    again = llama()
    assert gw.load(again, tmp_path).num_parameters == projected.num_parameters
    assert torch.equal(again(x).logits, out)


def test_eigenlorax__counts():
    assert counts(roberta_of("base"), gw.EigenLoRAx()) == (24_576, 24_576)


def test_eigenlorax__what_cannot_be_recycled():
    model = sources(llama())
    spread(gw.graft(model, gw.LoRA(r=3, at="q"), "q", head=False))
    gw.graft(model, gw.IA3(), "vectors", head=False)
    known = set(gw.adapters(model))
    for of, match in (
        (["a", "q"], "same sites"),
        ([], "at least one"),
        (["a", "a"], "once"),
        (["vectors"], "low-rank"),
    ):
        with pytest.raises(gw.GraftError, match=match):
            gw.recycle(model, "new", of=of, k=2)
    with pytest.raises(gw.GraftError, match="given to recycle"):
        gw.project(model, "new", of="a", onto="b")
    with pytest.raises(gw.GraftError, match="at most"):
        gw.recycle(model, "new", of=NAMES, k=8, extra=90)
    assert set(gw.adapters(model)) == known
