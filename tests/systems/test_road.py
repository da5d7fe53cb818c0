"""Liao and Monz 2024: pairs of output features are rotated and scaled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama, llama_of, spread
from peft import RoadConfig, get_peft_model
from torch import nn
from weight_models import around, counts, mixtral

import graftwork as gw

pytestmark = pytest.mark.system("road")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(variant="1", group=4, d_out=12):
    torch.manual_seed(0)
    model = around(nn.Linear(8, d_out))
    adapter = gw.graft(model, gw.RoAd(variant=variant, group=group, at="linear"), head=False)
    (delta,) = adapter.deltas()
    generator = torch.Generator().manual_seed(5)
    delta.theta.data = torch.randn(delta.theta.shape, generator=generator)
    delta.alpha.data = 1 + 0.3 * torch.randn(delta.alpha.shape, generator=generator)
    return model, delta, torch.randn(4, 8)


def pairs(h, group):
    """[.., groups, g / 2, 2]: the pairs of features."""
    return h.unflatten(-1, (-1, 2, group // 2)).transpose(-1, -2)


def test_road__rotations_preserve_the_norm_of_each_pair():
    for variant, preserved in (("1", True), ("2", False)):
        model, delta, x = layer(variant)
        delta.alpha.data.fill_(1.0)
        base = F.linear(x, model.site.weight, model.site.bias)
        same = torch.allclose(pairs(model(x), 4).norm(dim=-1), pairs(base, 4).norm(dim=-1), atol=1e-5)
        assert same is preserved


def test_road__without_an_angle_it_is_ia3_on_the_output():
    model, delta, x = layer("2")
    delta.theta.data.zero_()
    other = around(nn.Linear(8, 12))
    other.load_state_dict({n: p for n, p in model.state_dict().items() if "graft" not in n})
    (ia3,) = gw.graft(other, gw.IA3(side="output", at="linear"), head=False).deltas()
    ia3.scale.data = delta.alpha.data.clone()
    close(model(x), other(x), 1e-6)


@pytest.mark.parametrize("variant", ["1", "2", "4"])
def test_road__equals_the_definition(variant):
    model, delta, x = layer(variant)
    h = F.linear(x, model.site.weight, model.site.bias)
    out = torch.empty_like(h)
    theta, alpha = delta.theta.detach(), delta.alpha.detach()
    for start in range(0, 12, 4):
        for i in (0, 1):
            first, second = start + i, start + i + 2
            if variant == "1":
                at = [[start // 2 + i] * 2] * 2
            elif variant == "2":
                at = [[first, first], [second, second]]
            else:
                at = [[2 * start + i, 2 * start + 4 + i], [2 * start + i + 2, 2 * start + 4 + i + 2]]
            (a, b), (c, d) = at
            out[:, first] = alpha[a] * theta[a].cos() * h[:, first] - alpha[b] * theta[b].sin() * h[:, second]
            out[:, second] = alpha[c] * theta[c].cos() * h[:, second] + alpha[d] * theta[d].sin() * h[:, first]
    close(model(x), out)


@pytest.mark.parametrize("variant", ["1", "2", "4"])
def test_road__merged_equals_unmerged_with_the_bias(variant):
    model, _, x = layer(variant)
    out, bias = model(x), model.site.bias.detach().clone()
    gw.merge(model)
    close(model(x), out)
    assert not torch.allclose(model.site.bias, bias, atol=1e-2)
    gw.unmerge(model)
    assert torch.equal(model.site.bias, bias)
    experts, tokens = mixtral(), ids()
    adapter = gw.graft(experts, gw.RoAd(variant=variant, group=4, at="expert.gate_up, expert.down"), head=False)
    spread(adapter)
    out = experts(tokens).logits
    gw.merge(experts)
    close(experts(tokens).logits, out)


def test_road__a_scale_of_zero_can_be_unmerged():
    model, delta, x = layer()
    delta.alpha.data[0] = 0.0
    before = model.site.weight.detach().clone()
    gw.merge(model)
    assert torch.isfinite(model(x)).all()
    gw.unmerge(model)
    assert torch.equal(model.site.weight, before)


def test_road__twice_adds_angles_and_multiplies_scales():
    model, delta, x = layer()
    theta, alpha = delta.theta.data.clone(), delta.alpha.data.clone()
    twice = delta.turned(model(x))
    delta.theta.data, delta.alpha.data = 2 * theta, alpha**2
    close(model(x), twice)


def test_road__variants_contain_each_other():
    """2 with equal members of each pair is 1; 4 with equal halves is 2."""
    one, first, x = layer("1")
    two, second, _ = layer("2")
    four, third, _ = layer("4")
    for name in ("theta", "alpha"):
        small = getattr(first, name).data.view(-1, 1, 2).expand(-1, 2, 2).reshape(-1)
        getattr(second, name).data = small
        getattr(third, name).data = small.view(-1, 1, 4).expand(-1, 2, 4).reshape(-1)
    close(one(x), two(x), 1e-6)
    close(two(x), four(x), 1e-6)


def test_road__parts_that_turn_other_features_commute_and_are_put_together():
    model, delta, _ = layer("1")
    theta, alpha = delta.theta.data.clone(), delta.alpha.data.clone()
    whole, low = delta.weight(model.site.weight), torch.arange(6) < 2  # the angles of the first group, and the others
    halves = []
    for mine in (low, ~low):
        _, part, _ = layer("1")
        part.theta.data, part.alpha.data = torch.where(mine, theta, 0), torch.where(mine, alpha, 1)
        halves.append(part)
    a, b = halves
    close(a.weight(b.weight(model.site.weight)), whole)
    close(b.weight(a.weight(model.site.weight)), whole)


@pytest.mark.parametrize("make", [bert, llama])
def test_road__mixed_batch_equals_separate_runs(make):
    model, x = make(), ids(batch=4)
    for i, name in enumerate("abc"):
        adapter = gw.graft(model, gw.RoAd(group=8, variant="124"[i]), name, head=False)
        generator = torch.Generator().manual_seed(i)
        for p in adapter.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    apart = []
    for row, name in enumerate(["b", "a", "c", None]):
        with gw.using(model, name), torch.no_grad():
            apart.append(model(x[row : row + 1]).logits)
    gw.activate(model, gw.rows(["b", "a", "c", None]))
    with torch.no_grad():
        close(model(x).logits, torch.cat(apart))


@pytest.mark.parametrize("group", [64, 8])
@pytest.mark.parametrize("variant", ["1", "2", "4"])
def test_road__equals_hf_peft(group, variant):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 128), nn.Linear(128, 5)), torch.randn(3, 8)
    config = RoadConfig(variant=f"road_{variant}", group_size=group, target_modules=["0"], init_weights=False)
    theirs = get_peft_model(nn.Sequential(nn.Linear(8, 128), nn.Linear(128, 5)), config).eval()
    site = theirs.base_model.model[0]
    site.base_layer.load_state_dict(net[0].state_dict())
    theirs.base_model.model[1].load_state_dict(net[1].state_dict())
    (delta,) = gw.graft(net, gw.RoAd(variant=variant, group=group, at="/0/"), head=False).deltas()
    delta.theta.data = site.road_theta["default"].data.clone()
    delta.alpha.data = site.road_alpha["default"].data.clone()
    close(net(x), theirs(x))


def test_road__counts():
    """All linear layers of LLaMA-7B: 1,359,872 (0.02 %), twice and four times as many."""
    model = llama_of(4096, 32, 32, 11008)
    base = sum(p.numel() for p in model.parameters())
    for variant, factor, share in (("1", 1, 0.02), ("2", 2, 0.04), ("4", 4, 0.08)):
        number = 1_359_872 * factor
        assert counts(model, gw.RoAd(variant=variant)) == (number, number)
        assert 100 * number / base == pytest.approx(share, abs=0.005)


def test_road__a_group_that_does_not_divide_is_refused():
    model = around(nn.Linear(8, 12))
    with pytest.raises(gw.GraftError, match="8 does not divide 12"):
        gw.graft(model, gw.RoAd(group=8, at="linear"), head=False)
    with pytest.raises(gw.GraftError, match="even"):
        gw.RoAd(group=3)
    assert not gw.adapters(model)
