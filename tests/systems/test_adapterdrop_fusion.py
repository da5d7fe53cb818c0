"""Rücklé et al. 2021, section 5: AdapterFusion with the adapters of the smallest mean weight taken out, layer by layer."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, ids, spread
from routing_models import NORMS, members, pfeiffer, shares, states
from value_models import randomly

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("adapterdrop")

NAMES = "abcdefgh"
PLACES = [f"bert.encoder.layer.{i}.output.LayerNorm:norm" for i in range(3)]


def fused(method=gw.Fusion, names=NAMES):
    """Eight adapters with a fusion that weighs them differently."""
    model = members(bert(layers=3), pfeiffer(), names)
    spread(gw.graft(model, method(of=list(names)), "mix", head=False), 0.1)
    return model


def validation(model, batches: int = 3):
    """The mean weights over a few batches, the last one padded."""
    with gw.mixing_weights(model) as w, torch.no_grad():
        for seed in range(batches):
            mask = torch.ones(2, 7, dtype=torch.long)
            if seed == batches - 1:
                mask[1, 4:] = 0
            model(ids(seed=seed), attention_mask=mask)
    return w


def test_adapterdrop__mean_fusion_weights_are_those_of_the_tokens():
    model = fused()
    w = validation(model)
    assert list(w) == PLACES
    every = {place: [] for place in PLACES}
    for seed in range(3):
        mask = torch.ones(2, 7, dtype=torch.long)
        if seed == 2:
            mask[1, 4:] = 0
        seen = {}
        runtime = model.graft.runtime
        runtime.watching = lambda key, who, s, seen=seen: seen.__setitem__(key, s)
        states(model, "mix", ids(seed=seed), attention_mask=mask)
        runtime.watching = None
        for place in PLACES:
            every[place].append(seen[place][mask.bool()])
    for place in PLACES:
        mean = torch.cat(every[place]).mean(0)
        assert w[place] == pytest.approx(dict(zip(NAMES, mean.tolist(), strict=True)), abs=1e-6)
        assert sum(w[place].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", [gw.Fusion, gw.Weighted])
def test_adapterdrop__keeping_all_of_a_fusion_changes_nothing(method):
    model = fused(method)
    e = gw.pruned(model, "mix", validation(model), keep=len(NAMES))
    assert torch.equal(states(model, e), states(model, "mix"))
    assert str(e) == f"fuse({', '.join(NAMES)}, by=mix)"
    assert torch.equal(states(model, gw.pruned(model, "mix", validation(model), keep=99)), states(model, "mix"))


@pytest.mark.parametrize("method", [gw.Fusion, gw.Weighted])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_adapterdrop__the_softmax_is_over_those_that_are_left(keep, method):
    model = fused(method)
    w = validation(model)
    e = gw.pruned(model, "mix", w, keep)
    assert gw.parse(str(e)) == e
    before, after = shares(model, "mix"), shares(model, e)
    for place in PLACES:
        kept = sorted(sorted(NAMES, key=lambda n: -w[place][n])[:keep])
        assert after[place].shape[-1] == keep
        with gw.using(model, e), gw.mixing_weights(model) as now, torch.no_grad():
            model(ids())
        assert sorted(now[place]) == kept
        assert sum(now[place].values()) == pytest.approx(1, abs=1e-5)
    # in the first layer, whose input is the same: those weights, divided by their sum
    kept = [NAMES.index(n) for n in sorted(sorted(NAMES, key=lambda n: -w[PLACES[0]][n])[:keep])]
    left = before[PLACES[0]][..., kept]
    torch.testing.assert_close(
        after[PLACES[0]].expand_as(left), left / left.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(states(model, e), states(model, "mix"), atol=1e-3)


def test_adapterdrop__one_adapter_of_a_fusion_kept_everywhere_is_that_adapter():
    model = fused(gw.Weighted, "abc")
    for p in gw.adapters(model)["mix"].parameters():
        p.data = torch.tensor([0.0, 3.0, 1.0])
    e = gw.pruned(model, "mix", validation(model), keep=1)
    torch.testing.assert_close(states(model, e), states(model, "b"), atol=1e-5, rtol=1e-5)


def test_adapterdrop__fusion_layers_are_dropped():
    """(a): no fusion, and no adapter, in the lowest layers."""
    model = fused()
    none, all_ = states(model, None), states(model, "mix")

    def layers(expression):
        with torch.no_grad(), gw.using(model, expression):
            return model(ids(), output_hidden_states=True).hidden_states

    plain, dropped = layers(None), layers('drop(mix, layers="0-1")')
    assert all(torch.equal(plain[i], dropped[i]) for i in range(3))  # the embeddings and two layers
    assert not torch.allclose(dropped[3], none, atol=1e-3) and not torch.allclose(dropped[3], all_, atol=1e-3)
    torch.testing.assert_close(states(model, 'drop(mix, layers="0-2")'), none, atol=0, rtol=0)


def test_adapterdrop__a_fusion_is_pruned_by_what_it_mixes_alone():
    model = fused(names="abc")
    w = validation(model)
    for keep in (0, -1, True, 1.5):
        with pytest.raises(GraftError, match="not a number of adapters"):
            gw.pruned(model, "mix", w, keep)
    with pytest.raises(GraftError, match="not a mixture"):
        gw.pruned(model, "a", w, 1)
    with gw.mixing_weights(model) as empty:
        pass
    with pytest.raises(GraftError, match="no weights"):
        gw.pruned(model, "mix", empty, 1)
    randomly(model, gw.Bottleneck(d=3, at=NORMS, position="sum"), "z", 1)
    gw.activate(model, "a >> z")
    with pytest.raises(GraftError, match="0 mixtures"), gw.mixing_weights(model):
        pass
