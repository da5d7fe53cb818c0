"""Ansell et al. 2022: the numbers that move most, over all tensors together, rewound and trained alone."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, bert_of, ids, spread
from safetensors.torch import load_file
from torch import nn
from weight_models import around, counts

import graftwork as gw
from graftwork.methods.weight.forms.difference import budget, largest, size

pytestmark = pytest.mark.system("lt-sft")


def train(model, adapter, steps, total, start=0, optimizer=None, after=None):
    """Steps of AdamW with decay and momentum: the task is to bring the logits to fixed random ones."""
    x = ids()
    target = torch.randn(2, 2, generator=torch.Generator().manual_seed(4))
    optimizer = optimizer or torch.optim.AdamW(adapter.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    model.train()
    for t in range(start + 1, start + steps + 1):
        optimizer.zero_grad()
        ((model(x).logits - target).square().mean() + gw.auxiliary_loss(model)).backward()
        optimizer.step()
        gw.step(model, t / total, optimizer)
        if after is not None:
            after(t, optimizer)
    model.eval()
    return optimizer


def quiet(**more):
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more)


def adapted(adapter):
    """theta - theta_0 as the model sees it, tensor by tensor."""
    return [d.value(name).detach() for d in adapter.deltas() for name in d.tensors()]


def test_lt_sft__outside_the_mask_nothing_ever_moves():
    model, method = quiet(), gw.LTSFT(density=0.05, full=0.25)
    backbone = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = gw.graft(model, method, head=False)
    train(model, adapter, 20, 20)
    n, k = sum(map(size, adapter.sites)), budget(None, 0.05, adapter.sites)
    masks = [m for d in adapter.deltas() for m in d.masks.buffers()]
    assert sum(int(m.sum()) for m in masks) == k == int(0.05 * n) == adapter.num_parameters
    changes = adapted(adapter)
    moved = sum(int((c != 0).sum()) for c in changes)
    assert 0.9 * k < moved <= k
    assert not any(c[~m].any() for c, m in zip(changes, masks, strict=True))
    gw.merge(model)
    for site in adapter.sites:
        delta = adapter.parts[0].deltas[site.key]
        for name, tensor in (("change", site.weight.name), ("shift", site.weight.bias)):
            if name in delta.tensors():
                now = site.module._parameters[tensor]
                mask = delta.masks.get_buffer(name)
                mask = site.weight.restore(now, mask) if name == "change" else mask
                before = backbone[f"{site.path}.{tensor}"]
                assert torch.equal(now[~mask], before[~mask])
                moved -= int((now[mask] != before[mask]).sum())
    assert moved == 0  # and every other one is there
    gw.unmerge(model)


def test_lt_sft__the_mask_is_one_over_all_tensors():
    model = quiet()
    adapter = gw.graft(model, gw.LTSFT(k=300), head=False)
    spread(adapter)
    one = list(adapter.deltas())[3]
    one.change.data *= 1000
    assert one.change.numel() > 300
    gw.step(model, 0.5)
    kept = {key: sum(int(m.sum()) for m in d.masks.buffers()) for key, d in adapter.parts[0].deltas.items()}
    assert sum(kept.values()) == 300
    assert kept[one.key] == 300  # one for each tensor would have left the others their own


def test_lt_sft__the_largest_are_kept():
    sizes = [torch.tensor([[3.0, 0.1], [2.0, 5.0]]), torch.tensor([4.0, 0.0, 2.5])]
    masks = largest(sizes, 4)
    assert masks[0].tolist() == [[True, False], [False, True]]
    assert masks[1].tolist() == [True, False, True]
    assert sum(int(m.sum()) for m in largest(sizes, 7)) == 6  # what did not move at all is no difference


def test_lt_sft__the_second_phase_starts_at_the_pretrained_output_with_a_fresh_optimiser():
    model, x = quiet(), ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.LTSFT(density=0.05, full=0.5), head=False)
    seen = {}

    def after(t, optimizer):
        model.eval()
        seen[t] = model(x).logits, len(optimizer.state)
        model.train()

    train(model, adapter, 12, 20, after=after)
    assert not torch.equal(seen[9][0], before)
    assert torch.equal(seen[10][0], before)
    assert seen[9][1] == len(list(adapter.parameters()))
    assert seen[10][1] == 0
    assert not torch.equal(seen[12][0], before)


def test_lt_sft__differences_add_in_any_order_and_come_off_to_the_bit():
    model, x = quiet(), ids()
    before, weights = model(x).logits, {k: v.clone() for k, v in model.state_dict().items()}
    for i, name in enumerate(("task", "language")):
        adapter = gw.graft(model, gw.LTSFT(density=0.1, full=0.2), name, head=False)
        train(model, adapter, 3 + i, 10)
        assert all(d.settled for d in adapter.deltas())
    outputs = []
    for text in ("task + language", "language + task"):
        gw.activate(model, text)
        outputs.append(model(x).logits)
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
    assert (outputs[0] - before).abs().max() > 1e-3
    task, language = (gw.adapters(model)[name] for name in ("task", "language"))
    gw.activate(model, "task")
    gw.merge(model)
    merged = {k: v.clone() for k, v in model.state_dict().items() if "graft" not in k}
    gw.unmerge(model)
    gw.activate(model, "task + language")
    gw.merge(model)
    for site in task.sites:  # theta_0 + phi_task + phi_language, tensor by tensor
        name = f"{site.path}.{site.weight.name}"
        phi = language.parts[0].deltas[site.key].value("change")
        expected = site.weight.dense(merged[name]) + phi
        torch.testing.assert_close(site.weight.dense(model.state_dict()[name]), expected.detach(), atol=1e-6, rtol=1e-6)
    gw.unmerge(model)
    for name in ("task", "language"):
        gw.remove(model, name)
    assert torch.equal(model(x).logits, before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_lt_sft__all_numbers_are_full_fine_tuning():
    x, target = torch.randn(16, 6), torch.randn(16, 4)
    model, plain = around(nn.Linear(6, 4)), around(nn.Linear(6, 4))
    plain.load_state_dict(model.state_dict())
    adapter = gw.graft(model, gw.LTSFT(k=28, full=0.0, at="linear"), head=False)
    nn.init.ones_(next(adapter.deltas()).change)
    nn.init.ones_(next(adapter.deltas()).shift)
    gw.step(model, 0.0)
    for net, parameters in ((model, list(adapter.parameters())), (plain, list(plain.site.parameters()))):
        optimizer = torch.optim.Adam(parameters, lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (net(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)


def test_lt_sft__l1_is_a_mean_over_all_numbers():
    model = quiet()
    adapter = gw.graft(model, gw.LTSFT(l1=0.3), head=False)
    spread(adapter)
    every = torch.cat([p.detach().flatten() for p in adapter.parameters()])
    torch.testing.assert_close(gw.auxiliary_loss(model), 0.3 * every.abs().mean())


def test_lt_sft__a_file_holds_places_and_values(tmp_path):
    model, x = quiet(), ids()
    adapter = gw.graft(model, gw.LTSFT(density=0.05, full=0.25), "a", head=False)
    train(model, adapter, 8, 20)
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    gw.save(model, "a", tmp_path / "resume", resume=True)
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    k = budget(None, 0.05, adapter.sites)
    assert sum(t.numel() for t in stored.values() if t.is_floating_point()) == k
    assert sum(t.numel() for t in stored.values() if t.dtype == torch.int32) == k
    changes = adapted(adapter)
    for folder in ("a", "resume"):
        again = quiet()
        loaded = gw.load(again, tmp_path / folder, trainable=True)
        assert torch.equal(again(x).logits, out)
        assert all(map(torch.equal, adapted(loaded), changes))
        train(again, loaded, 3, 20, start=8)  # the mask stays
        assert not any(d.value(n)[~d.masks.get_buffer(n)].any() for d in loaded.deltas() for n in d.tensors())


def test_lt_sft__counts():
    """mBERT's shape: the budgets of the paper's task and language differences, and all of it in the first phase."""
    model = bert_of("base")
    formula, made = counts(model, gw.LTSFT(k=14_155_776))
    sites = gw.graft(model, gw.LTSFT(k=14_155_776), head=False).sites
    assert formula == made == sum(map(size, sites)) > 14_155_776
    for k in (14_155_776, 7_667_712):
        assert budget(k, 0.01, sites) == k


def test_lt_sft__impossible_budgets_are_refused():
    model = around(nn.Linear(6, 4))
    for method in (gw.LTSFT(k=29, at="linear"), gw.LTSFT(density=0.01, at="linear")):
        with pytest.raises(gw.GraftError, match="28 numbers"):
            gw.graft(model, method, head=False)
    assert type(model.site) is nn.Linear
