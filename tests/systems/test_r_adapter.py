"""Kim et al. 2024: linear adapters in both encoders of CLIP, and their ensembles of themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import ids, images, spread
from modal_models import clip, clip_of
from torch import nn
from weight_models import around, counts, dense

import graftwork as gw
from graftwork.objectives.mpm_nce import mpm_nce

pytestmark = pytest.mark.system("r-adapter")


def similarity(model, grad: bool = False):
    with torch.set_grad_enabled(grad):
        out = model(input_ids=ids(), pixel_values=images(), attention_mask=torch.ones(2, 7).long())
        return torch.cat([out.text_embeds, out.image_embeds])


def small(**how):
    """One layer with an adapter, its input, and the delta."""
    model = around(nn.Linear(8, 12))
    adapter = gw.graft(model, gw.RAdapter(at="/site/", **how), head=False)
    spread(adapter)
    return model, torch.randn(5, 8, generator=torch.Generator().manual_seed(2)), next(adapter.deltas())


@pytest.mark.parametrize("r", [None, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_r_adapter__a_merge_at_alpha_lies_between_the_backbone_and_the_adapted_model(r, alpha):
    model = clip()
    names = {n: p.detach().clone() for n, p in model.named_parameters()}
    base = similarity(model)
    adapter = gw.graft(model, gw.RAdapter(r=r), "a", head=False)
    spread(adapter, 0.1)
    gw.step(model, 1.0)  # the merged matrix is the accumulated one
    full = similarity(model)
    gw.activate(model, f"{alpha}*a")
    rescaled = similarity(model)
    gw.merge(model)
    for delta in adapter.deltas():
        module = delta.key.rpartition(":")[0]
        w, b = names[f"{module}.weight"], names[f"{module}.bias"]
        eye = torch.eye(len(w))
        replaced = (eye + delta.mean) @ w, (eye + delta.mean) @ b
        torch.testing.assert_close(model.get_submodule(module).weight, alpha * replaced[0] + (1 - alpha) * w)
        torch.testing.assert_close(model.get_submodule(module).bias, alpha * replaced[1] + (1 - alpha) * b)
    torch.testing.assert_close(similarity(model), rescaled, atol=1e-5, rtol=1e-5)
    if alpha in (0, 1):
        torch.testing.assert_close(rescaled, full if alpha else base, atol=1e-5, rtol=1e-5)
    gw.unmerge(model)
    assert all(torch.equal(dense(model, d.key), names[f"{d.key.rpartition(':')[0]}.weight"]) for d in adapter.deltas())


def test_r_adapter__dropping_is_right_on_average_and_none_is_deterministic():
    model, x, delta = small(p=0.25, momentum=0.0)
    with torch.no_grad():
        base = F.linear(x, model.site.weight, model.site.bias)
        evaluated = model(x)
    torch.testing.assert_close(evaluated, base + base @ delta.up.T)
    torch.manual_seed(0)
    model.train()
    seen = [model(x).detach() for _ in range(400)]
    assert (
        len({tuple(out.flatten().tolist()) for out in seen}) == 2
    )  # one draw for the whole batch: all of it, or nothing
    dropped = sum(torch.equal(out, base) for out in seen) / 400
    assert abs(dropped - 0.25) < 0.07
    kept = next(out for out in seen if not torch.equal(out, base))
    torch.testing.assert_close(0.25 * base + 0.75 * kept, evaluated, atol=1e-5, rtol=1e-5)
    model, x, delta = small(p=0.0, momentum=0.0)
    assert len({tuple(model.train()(x).flatten().tolist()) for _ in range(5)}) == 1


def test_r_adapter__each_adapter_draws_for_itself():
    model = clip()
    adapter = gw.graft(model, gw.RAdapter(p=0.5), head=False)
    spread(adapter, 0.1)
    model.train()
    torch.manual_seed(1)
    similarity(model, grad=True)
    assert {delta.kept for delta in adapter.deltas()} == {0.0, 2.0}


@pytest.mark.parametrize("r", [None, 3])
def test_r_adapter__the_average_of_constant_steps(r, tmp_path):
    model, x, delta = small(r=r, momentum=0.9)
    m = (delta.up if r is None else delta.up @ delta.down).detach()
    with torch.no_grad():
        base = F.linear(x, model.site.weight, model.site.bias)
        torch.testing.assert_close(model(x), base + base @ m.T)  # nothing is accumulated yet
    for n in range(1, 5):
        gw.step(model, n / 4)
        torch.testing.assert_close(delta.mean, (1 - 0.9**n) * m)
    with torch.no_grad():
        out = model(x)
        torch.testing.assert_close(out, base + base @ delta.mean.T)
        torch.manual_seed(3)
        delta.kept = 1.0
        torch.testing.assert_close(model.train()(x), base + base @ m.T)  # what trains is M, not its average
        gw.save(model.eval(), "default", tmp_path)
        twin = around(nn.Linear(8, 12))
        twin.load_state_dict({n: p for n, p in model.state_dict().items() if "graft" not in n})
        loaded = gw.load(twin, tmp_path)
        assert torch.equal(twin(x), out) and loaded.num_parameters == 12**2
        assert torch.equal(next(loaded.deltas()).up, delta.mean)  # all that a user of the file wants


def test_r_adapter__both_encoders_of_clip_learn_and_start_as_they_were():
    model = clip()
    base = similarity(model)
    adapter = gw.graft(model, gw.RAdapter(p=0.0), head=False)
    assert torch.equal(similarity(model), base)
    assert {d.key.partition(".")[0] for d in adapter.deltas()} == {"text_model", "vision_model"}
    out = similarity(model.train(), grad=True)
    mpm_nce(out[2:], out[:2]).backward()
    assert all(d.up.grad.any() for d in adapter.deltas())


def test_r_adapter__counts_of_clip():
    assert counts(clip_of("base"), gw.RAdapter()) == (20_447_232, 20_447_232)
    assert round(counts(clip_of("large"), gw.RAdapter())[0] / 1e6, 1) == 64.5
    assert counts(clip_of("base"), gw.RAdapter(r=4)) == (24 * 2 * 4 * (768 + 512),) * 2


def vectors(n: int = 6, d: int = 4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def test_r_adapter__loss_is_infonce_and_grows_with_the_margin():
    f, g = vectors()
    logits = F.normalize(f, dim=1) @ F.normalize(g, dim=1).T / 0.5
    pairs = torch.arange(6)
    symmetric = F.cross_entropy(logits, pairs, reduction="sum") + F.cross_entropy(logits.T, pairs, reduction="sum")
    torch.testing.assert_close(mpm_nce(f, g, margin=0.0, temperature=0.5), symmetric)
    losses = [float(mpm_nce(f, g, margin=m, temperature=0.5)) for m in (0.0, 0.05, 0.2)]
    assert losses[0] < losses[1] < losses[2]


def test_r_adapter__loss_with_several_positives_by_hand():
    f, g = vectors(4)
    y = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
    e, m, tau, total = 0.1, 0.3, 0.7, 0.0
    s = F.normalize(f, dim=1) @ F.normalize(g, dim=1).T
    for i in range(4):
        p = int(y[i].sum())
        for j in range(4):
            t = (1 - e) / p if y[i, j] else e / (4 - p)
            across = torch.stack([torch.exp((s[i, k] + (0 if y[i, k] else m)) / tau) for k in range(4)])
            down = torch.stack([torch.exp((s[k, j] + (0 if y[k, j] else m)) / tau) for k in range(4)])
            total -= t * torch.log(across[j] / across.sum()) + t * torch.log(down[i] / down.sum())
    torch.testing.assert_close(mpm_nce(f, g, y, margin=m, temperature=tau, smoothing=e), total)


def test_r_adapter__what_makes_no_sense_is_refused():
    f, g = vectors()
    with pytest.raises(gw.GraftError, match="without a positive"):
        mpm_nce(f, g, torch.zeros(6, 6))
    with pytest.raises(gw.GraftError, match="batch, d"):
        mpm_nce(f, g[:3])
    with pytest.raises(gw.GraftError, match="momentum=1"):
        gw.RAdapter(momentum=1.0)
    with pytest.raises(gw.GraftError, match="vector"):
        gw.graft(clip(), gw.RAdapter(at="norm"), head=False)
