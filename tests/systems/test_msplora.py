"""Zhao et al. 2025: a LoRA of all layers, one of each group of layers, one of each layer."""

from __future__ import annotations

import pytest
import torch
from adapter_models import ids, llama, llama_of, spread
from started import close, train
from torch import nn
from weight_models import around, counts, dense, gpt2, roberta_of

import graftwork as gw

pytestmark = pytest.mark.system("msplora")


def randomised(adapter):
    spread(adapter)
    return [*adapter.parts[0].deltas.values()]


def test_msplora__the_reported_counts():
    assert counts(roberta_of("base"), gw.MSPLoRA(r=8)) == (135_168, 135_168)
    assert counts(llama_of(4096, 32, 32, 11008), gw.MSPLoRA(r=64)) == (11_010_048, 11_010_048)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_msplora__shared_pairs_act_everywhere_and_learn_from_everywhere(make, dropout):
    model, x = make(layers=6), ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.MSPLoRA(r=4, dropout=dropout), head=False)
    assert torch.equal(model(x).logits, before)
    deltas = randomised(adapter)
    kinds = {id(d._shared[0]): d._shared[0] for d in deltas}
    assert len(kinds) == 2  # q and v
    weights = [dense(model, key).detach() for key in adapter.parts[0].deltas]
    old = [d.weight(w).detach() for d, w in zip(deltas, weights, strict=True)]
    model(x).logits.square().mean().backward()
    (top, *_) = kinds.values()
    whole, parts = top.up.grad.clone(), torch.zeros_like(top.up)
    for kept in [d for d in deltas if d._shared[0] is top]:
        for other in (d for d in deltas if d._shared[0] is top and d is not kept):
            other._shared = (untied(top), *other._shared[1:])
        adapter.parts[0].shared_modules.zero_grad()
        model(x).logits.square().mean().backward()
        parts += top.up.grad
        for d in deltas:
            if not any(d._shared[0] is k for k in kinds.values()):
                d._shared = (top, *d._shared[1:])
    close(parts, whole, 1e-4 * whole.abs().max().item())
    for k in kinds.values():
        k.up.data.add_(1.0)
    assert all((d.weight(w) - o).abs().max() > 0.1 for d, w, o in zip(deltas, weights, old, strict=True))


def untied(pair) -> nn.Module:
    copy = nn.Module()
    copy.down, copy.up = pair.down.detach().clone(), pair.up.detach().clone()
    return copy


def test_msplora__its_ends_are_loras():
    """One level is one LoRA for all layers; the last level alone is LoRA."""
    model, x = llama(), ids()
    adapter = gw.graft(model, gw.MSPLoRA(r=3, levels=1, dropout=0.0), head=False)
    assert adapter.num_parameters == 3 * (64 + 32 + 16)
    deltas = randomised(adapter)
    tied = llama()
    lora = gw.graft(tied, gw.LoRA(r=3), head=False)
    for theirs, mine in zip(lora.deltas(), deltas, strict=True):
        assert mine.own is None
        theirs.down, theirs.up = mine._shared[0].down, mine._shared[0].up
    close(model(x).logits, tied(x).logits)
    model, other = llama(), llama()
    own = gw.graft(model, gw.MSPLoRA(ranks=(0, 0, 2), dropout=0.0), head=False)
    plain = gw.graft(other, gw.LoRA(r=2), head=False)
    spread(own), spread(plain)
    assert own.num_parameters == plain.num_parameters
    assert torch.equal(model(x).logits, other(x).logits)


def test_msplora__merging_writes_three_different_updates():
    model, x = llama(layers=3), ids()
    adapter = gw.graft(model, gw.MSPLoRA(r=4, at="q"), head=False)
    randomised(adapter)
    keys = list(adapter.parts[0].deltas)
    before = [dense(model, key).detach().clone() for key in keys]
    with torch.no_grad():
        out = model(x).logits
        gw.merge(model)
        close(model(x).logits, out, 1e-4)
    updates = [dense(model, key).detach() - w for key, w in zip(keys, before, strict=True)]
    assert all((a - b).abs().max() > 0.1 for a, b in zip(updates, updates[1:] + updates[:1], strict=True))
    parts = [adapter.parts[0].deltas[key] for key in keys]
    shared = parts[0].alpha / 4 * parts[0]._shared[0].up @ parts[0]._shared[0].down
    ranks = [int((torch.linalg.svdvals(u - shared) > 1e-4).sum()) for u in updates]
    assert ranks == [3, 3, 3]  # less what all share, the group's 2 and the layer's 1


def test_msplora__dropout_is_drawn_for_each_level():
    torch.manual_seed(0)
    model = around(nn.Linear(16, 8, bias=False)).train()
    adapter = gw.graft(model, gw.MSPLoRA(ranks=(1, 1), dropout=0.5, at="linear"), head=False)
    (delta,) = randomised(adapter)
    (_, one), (_, two) = delta.pairs()
    two.down.data, two.up.data = one.down.data.clone(), -one.up.data.clone()
    x, base = torch.randn(4, 16), model.site.weight
    close(model.eval()(x), x @ base.T)  # they cancel, unless each has its own draw
    assert (model.train()(x) - x @ base.T).abs().max() > 1e-2


def test_msplora__layers_of_a_group_share_and_it_trains(tmp_path):
    model, x = llama(layers=6), ids()
    adapter = gw.graft(model, gw.MSPLoRA(r=4, at="q"), "a", head=False)
    deltas = list(adapter.deltas())
    groups = [id(d._shared[1]) for d in deltas]
    assert [groups.index(g) for g in groups] == [0, 0, 2, 2, 4, 4]
    train(model, x)
    gw.save(model, "a", tmp_path)
    again = llama(layers=6)
    gw.load(again, tmp_path)
    assert torch.equal(again(x).logits, model.eval()(x).logits)
    for wrong in ({"r": 3}, {"ranks": (0, 0)}, {"ranks": (-1, 2)}):
        with pytest.raises(gw.GraftError):
            gw.MSPLoRA(**wrong)
