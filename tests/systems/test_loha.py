"""Hyeon-Woo et al. 2022 and LyCORIS: the elementwise product of two low-rank products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama_of, spread
from peft import LoHaConfig, get_peft_model
from torch import nn
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.forms.factor import spread_over
from graftwork.methods.weight.forms.hadamard import HadamardProduct

pytestmark = pytest.mark.system("loha")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(site, **options):
    """One layer with LoHa: the model, its delta."""
    torch.manual_seed(0)
    model = around(site)
    adapter = gw.graft(model, gw.LoHa(at="/site/", **options), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    return model, delta


def change(model, delta):
    return (delta.weight(model.site.weight.detach().flatten(1)) - model.site.weight.flatten(1)).detach()


def by_definition(delta, one=None, two=None):
    one = delta.up1 @ delta.down1 if one is None else one
    two = delta.up2 @ delta.down2 if two is None else two
    return delta.scale * one * two


@pytest.mark.parametrize(("shape", "rank"), [((24, 16), 16), ((40, 48), 16), ((10, 48), 10)])
def test_loha__rank_of_the_update(shape, rank):
    """min(r^2, out, in), where a LoRA of as many parameters has 2 r."""
    model, delta = layer(nn.Linear(*shape[::-1]), r=4)
    assert torch.linalg.matrix_rank(change(model, delta), rtol=1e-5) == rank
    other = around(nn.Linear(*shape[::-1]))
    lora = gw.graft(other, gw.LoRA(r=8, at="/site/"), head=False)
    spread(lora)
    assert lora.num_parameters == sum(p.numel() for p in delta.parameters())
    (thin,) = lora.deltas()
    assert torch.linalg.matrix_rank((thin.up @ thin.down).detach(), rtol=1e-5) == 8


@pytest.mark.parametrize("d", [16, 200])  # the form with dW, and that with factors
def test_loha__a_matrix_of_ones_leaves_a_lora(d):
    model, delta = layer(nn.Linear(d, d + 8), r=4, alpha=6.0)
    with torch.no_grad():
        delta.up2.zero_()[:, -1] = 1
        delta.down2.normal_()[-1] = 1
    assert (delta.factors() is None) == (d == 16)
    close(change(model, delta), 1.5 * (delta.up1 @ delta.down1).detach(), 1e-4)
    x = torch.randn(5, d)
    lora = x @ delta.down1.T @ delta.up1.T
    close(model(x), F.linear(x, model.site.weight, model.site.bias) + 1.5 * lora, 1e-4)


def test_loha__custom_backward_equals_autograd():
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 3), (3, 5), (6, 2), (2, 5))
    given = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    grad = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(HadamardProduct.apply(*given), given, grad)
    plain = torch.autograd.grad((given[0] @ given[1]) * (given[2] @ given[3]), given, grad)
    for a, b in zip(ours, plain, strict=True):
        close(a, b, 1e-6)
    assert torch.autograd.gradgradcheck(HadamardProduct.apply, given)
    stacked = [g.detach().expand(4, *g.shape) for g in given]
    close(torch.func.vmap(HadamardProduct.apply)(*stacked)[2], HadamardProduct.apply(*given))


def test_loha__nothing_dense_is_kept_for_the_backward_pass():
    given = [torch.randn(s, requires_grad=True) for s in ((40, 3), (3, 50), (40, 3), (3, 50))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        HadamardProduct.apply(*given)
    assert sorted(kept) == sorted(tuple(g.shape) for g in given)


def test_loha__effective_convolutions():
    """A kernel of 1 needs no cores: the linear formula; otherwise each kernel entry is the Tucker form, summed out here."""
    model, delta = layer(nn.Conv2d(6, 5, 1), r=2, effective=True)
    assert delta.core1 is None
    close(change(model, delta), by_definition(delta).detach())
    ones = torch.eye(2).reshape(2, 2, 1, 1)  # cores of a kernel of 1 that are the identity
    close(spread_over(ones, delta.down1), delta.down1)
    for site, size in ((nn.Conv2d(6, 8, (3, 2), groups=2), (3, 2)), (nn.Conv1d(4, 6, 3), (3,))):
        model, delta = layer(site, r=2, alpha=3.0, effective=True)
        assert delta.core1.shape == (2, 2, *size)
        w = site.weight
        each = []
        for core, up, down in ((delta.core1, delta.up1, delta.down1), (delta.core2, delta.up2, delta.down2)):
            t = core.reshape(2, 2, -1)
            each.append(sum(up[:, p, None, None] * down[q, :, None] * t[p, q] for p in range(2) for q in range(2)))
        close(change(model, delta), (1.5 * each[0] * each[1]).reshape(w.shape[0], -1).detach())
        x = torch.randn(2, site.in_channels, 7, 7) if len(size) == 2 else torch.randn(2, 4, 7)
        out = model(x)
        gw.merge(model)
        close(model(x), out)


def test_loha__a_peft_adapter_computes_the_same(tmp_path):
    torch.manual_seed(0)
    host = around(nn.Linear(24, 16))
    theirs = get_peft_model(host, LoHaConfig(r=4, alpha=6, target_modules=["site"], init_weights=False)).eval()
    x = torch.randn(3, 24)
    expected = theirs(x)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(0)
    ours = around(nn.Linear(24, 16))
    before = ours(x)
    (delta,) = gw.load(ours, tmp_path).deltas()
    assert {n: tuple(p.shape) for n, p in delta.named_parameters()} == {
        "up1": (16, 4), "down1": (4, 24), "up2": (16, 4), "down2": (4, 24),
    }  # fmt: skip
    close(ours(x), expected)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.parametrize("d", [12, 200])
def test_loha__rows_dropped(d):
    """Whole output rows of the update, those left scaled by 1 / mean(m); finite where none is left."""
    model, _ = layer(nn.Linear(d, 4, bias=False), r=2 if d == 12 else 1, rank_dropout=0.5)
    x = torch.randn(6, d)
    whole, base = model(x) - F.linear(x, model.site.weight), F.linear(x, model.site.weight)
    model.train()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        edit = model(x) - base
        kept = edit.abs().amax(0) > 0
        seen.add(int(kept.sum()))
        scale = 4 / max(1, int(kept.sum()))
        close(edit, torch.where(kept, whole * scale, 0.0), 1e-4)
    assert 0 in seen and len(seen) > 2


def test_loha__rows_all_dropped_is_finite():
    model, _ = layer(nn.Linear(12, 2), r=2, rank_dropout=0.9)
    model.train()
    x = torch.randn(3, 12)
    outs = []
    for seed in range(50):
        torch.manual_seed(seed)
        outs.append(model(x))
    assert torch.isfinite(torch.stack(outs)).all()
    assert sum(torch.equal(out, F.linear(x, model.site.weight, model.site.bias)) for out in outs) > 30


def test_loha__the_whole_update_dropped():
    model, _ = layer(nn.Linear(12, 8), r=2, module_dropout=0.5)
    x = torch.randn(3, 12)
    whole, base = model(x), F.linear(x, model.site.weight, model.site.bias)
    model.train()
    kinds = {"whole": 0, "none": 0}
    for seed in range(40):
        torch.manual_seed(seed)
        out = model(x)
        kinds["whole" if torch.allclose(out, whole, atol=1e-5) else "none"] += 1
        assert torch.allclose(out, whole, atol=1e-5) or torch.allclose(out, base, atol=1e-5)
    assert min(kinds.values()) > 10
    gw.merge(model)  # never drawn
    close(model(x), whole)


def test_loha__rows_of_a_batch_in_training_are_refused():
    model = bert()
    for name in "ab":
        gw.graft(model, gw.LoHa(r=2, rank_dropout=0.1), name, head=False)
    gw.activate(model, gw.rows(["a", "b"]))
    with pytest.raises(gw.GraftError, match="dropout"):
        model.train()(ids())


def test_loha__initial_values():
    for init, stds in (
        ("kaiming", {"up1": 0.577 / 2, "down1": 0.577 / 20, "up2": 0.577 / 2}),
        ("lycoris", {"up1": 0.1, "down1": 1, "down2": 1}),
    ):
        torch.manual_seed(0)
        model = around(nn.Linear(400, 300))
        (delta,) = gw.graft(model, gw.LoHa(r=4, init=init, at="/site/"), head=False).deltas()
        for name, std in stds.items():
            assert getattr(delta, name).std().item() == pytest.approx(std, rel=0.06), name
        assert not (delta.down2 if init == "kaiming" else delta.up2).any()
        model(torch.randn(2, 400)).sum().backward()
        assert (delta.down2 if init == "kaiming" else delta.up2).grad.any()


def test_loha__counts():
    both = nn.ModuleDict({"one": nn.Linear(16, 24), "two": nn.Linear(24, 16)})
    assert counts(both, gw.LoHa(r=4, at="/one|two/")) == (640, 640)
    conv = nn.ModuleDict({"one": nn.Conv2d(6, 8, (3, 2), groups=2)})
    assert counts(conv, gw.LoHa(r=2, at="/one/")) == (2 * 2 * (8 + 18),) * 2
    assert counts(conv, gw.LoHa(r=2, at="/one/", effective=True)) == (2 * 2 * (8 + 3) + 2 * 4 * 6,) * 2
    # as many as a LoRA of twice the rank on the same sites
    model = llama_of(4096, 32, 32, 11008)
    assert counts(model, gw.LoHa(r=8)) == counts(model, gw.LoRA(r=16)) == (8_388_608, 8_388_608)
