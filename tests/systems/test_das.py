"""Wu et al. 2023: whole blocks are left out, chosen by a bandit, and a small adapter stands in for each."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, bert_of, gpt2, ids, images, llama, spread, t5, vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from weight_models import counts

import graftwork as gw
from graftwork.methods.block.forms.search import Search

pytestmark = pytest.mark.system("das")


class Gate:
    """What a search asks of the delta of a block."""

    def __init__(self):
        self.gate, self.instead, self.pruned = torch.zeros(()), None, 0

    def parameters(self):
        return []


def search(n, **options):
    made = Search(gw.DAS(**options), [str(i) for i in range(n)])
    for name in made.names:
        made.hold(Gate(), name)
    return made


def adapted(make=vit, layers=3, **options):
    model = make(layers)
    adapter = gw.graft(model, gw.DAS(**{"skip_width": 6, "adapter_width": 4, **options}), "a", head=False)
    spread(adapter, 0.1)
    return model, adapter


def test_das__update_on_hand_numbers():
    """pi = 1/2, R = (0.9, 0.6, 0.6): the blocks of s_1 move by 0.2 / 4, the others by -0.1 / 4 for each time."""
    found = search(5, k=2)
    found.update([[0, 1], [1, 2], [2, 3]], [0.9, 0.6, 0.6])
    torch.testing.assert_close(found.gates, torch.tensor([0.2, 0.1, -0.2, -0.1, 0.0]) * 0.25)
    assert found.chosen == {"0", "1"}
    found.update([[4, 0]], [0.3])  # one reward is its own mean
    torch.testing.assert_close(found.gates[4], torch.tensor(0.0))
    before = found.gates
    pi = before.sigmoid()
    found.update([[0, 2], [1, 3]], [0.5, 0.1])
    torch.testing.assert_close(found.gates[:2] - before[:2], torch.tensor([0.2, -0.2]) * (pi * (1 - pi))[:2])


def test_das__draws_are_distinct_subsets_in_proportion_to_pi():
    found = search(6, k=2)
    found.next_trial()
    assert len({tuple(t) for t in found._trials}) == 3
    assert all(len(set(t)) == 2 for t in found._trials)
    found = search(3, k=1)
    torch.manual_seed(0)
    found._blocks["0"].gate.fill_(2.0)
    drawn = torch.tensor([found._subset()[0] for _ in range(4000)]).bincount(minlength=3) / 4000
    pi = torch.tensor([2.0, 0.0, 0.0]).sigmoid()
    torch.testing.assert_close(drawn, pi / pi.sum(), atol=0.03, rtol=0)


def test_das__the_search_finds_the_block_that_does_nothing():
    """Leaving out block 3 costs nothing, any other much: over 95% of 100 seeds pick it after 60 turns."""
    picked = 0
    for seed in range(100):
        torch.manual_seed(seed)
        found = search(6, k=1, turns=60)
        while not found.settled:
            found.next_trial()
            (left_out,) = found._drawn
            found.losses.append(torch.tensor(0.1 if left_out == "3" else 0.7) + 0.1 * torch.rand(()))
            found.reward()
        picked += found.chosen == {"3"}
    assert picked > 95


class Toy(nn.Module):
    """Residual blocks of which number 3 adds nothing."""

    class Block(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(d), nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    def __init__(self, n=6, d=16):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(d) for _ in range(n))
        for p in self.blocks[3].mlp[2].parameters():
            p.data.zero_()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_das__the_search_on_a_model():
    """Held-out rows of a task that the frozen model does: only block 3 can go."""
    torch.manual_seed(0)
    model = Toy()
    x = torch.randn(8, 5, 16)
    target = model(x).detach() + 0.01 * torch.randn(8, 5, 16)
    gw.graft(model, gw.DAS(k=1, skip_width=4, adapter_width=4, turns=40, at="block, mlp"), "a", head=False)
    for _ in range(40):
        gw.calibrate(model, [x], lambda m, batch: 20 * F.mse_loss(m(batch), target))
    with pytest.raises(gw.GraftError, match="over"):
        gw.calibrate(model, [x], lambda m, batch: m(batch).mean())
    torch.testing.assert_close(model(x), target, atol=0.1, rtol=0)
    called = count_calls(model.blocks)
    model(x)
    assert called == [1, 1, 1, 0, 1, 1]


def count_calls(blocks):
    """How often the first norm inside of each block runs."""
    called = [0] * len(blocks)

    def count(i):
        def hook(module, args):
            called[i] += 1

        return hook

    for i, block in enumerate(blocks):
        next(m for m in block.modules() if isinstance(m, nn.LayerNorm)).register_forward_pre_hook(count(i))
    return called


def test_das__a_block_that_is_left_out_is_not_called_and_has_no_operations():
    model, adapter = adapted(layers=4, k=2)
    x = images()
    called = count_calls(model.vit.layers)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert called == [1, 1, 0, 0]
    with torch.no_grad(), gw.using(model, None), FlopCounterMode(display=False) as whole:
        model(x)
    tokens, d = 2 * 5, 32
    block = 2 * tokens * (4 * d * d + 2 * d * 64)  # the counter has none for q k^T and p v on a CPU
    inside, instead = 2 * 2 * tokens * 2 * d * 4, 2 * tokens * 2 * d * 6
    assert whole.get_total_flops() - counter.get_total_flops() == 2 * block - 2 * inside - 2 * instead
    model.train()
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        called[:] = [0] * 4
        loss = model(x).logits.square().mean()
        assert sum(called) == 2
        drawn.add(tuple(called))
        loss.backward()
    assert len(drawn) > 2
    gates = [d.gate for d in adapter.deltas() if hasattr(d, "gate") and isinstance(d.gate, torch.Tensor)]
    assert len(gates) == 4
    assert not any(g.requires_grad or g.grad is not None for g in gates)


class Deployed(nn.Module):
    """x + W_u relu(W_d LN(x)), in the place of a block."""

    def __init__(self, residual):
        super().__init__()
        self.own = {name: p.detach() for name, p in residual.named_parameters()}

    def forward(self, x, *args, **kwargs):
        own = self.own
        h = F.layer_norm(x, x.shape[-1:], own["norm_weight"], own["norm_bias"])
        return x + F.linear(F.relu(F.linear(h, own["down"], own["down_bias"])), own["up"], own["up_bias"])


@torch.no_grad()
def test_das__a_deployed_model_needs_no_removed_block(tmp_path):
    model, adapter = adapted(layers=4, k=2, turns=1)
    x = images()
    with torch.enable_grad():
        torch.manual_seed(3)
        gw.calibrate(model, [x], lambda m, batch: m(batch).logits.square().mean())
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    chosen = adapter.parts[0].shared_modules["search"].chosen
    small = vit(4)
    for name in chosen:
        small.vit.layers[int(name)].to("meta")  # gone
    loaded = gw.load(small, tmp_path / "a")
    assert set(loaded.methods[0].blocks) == chosen
    assert loaded.num_parameters == adapter.num_parameters
    assert torch.equal(small(x).logits, out)
    stands_in = {d.name: d.instead for d in loaded.deltas() if hasattr(d, "name")}
    assert stands_in.keys() == chosen
    gw.remove(small, loaded.name)
    plain = vit(4)
    rest = gw.graft(plain, gw.DAS(skip_width=6, adapter_width=4, blocks=tuple(chosen)), "b", head=False)
    for a, b in zip(rest.deltas(), loaded.deltas(), strict=True):
        a.load_state_dict(b.state_dict())
    for name in chosen:
        handle = Deployed(stands_in[name])
        plain.vit.layers[int(name)].forward = handle.forward
    with pytest.warns(UserWarning, match="no effect"):  # this model has its own modules there, not the adapter's
        torch.testing.assert_close(plain(x).logits, out)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (bert, {"input_ids": ids()}),
        (llama, {"input_ids": ids()}),
        (gpt2, {"input_ids": ids()}),
        (t5, {"input_ids": ids(), "decoder_input_ids": ids(seq=4)}),
    ],
)
def test_das__on_text_models(make, inputs):
    """It trains, saves while it searches, and a cache of keys and values does not change what is generated."""
    model, adapter = adapted(make, layers=3, k=1)
    model.train()
    torch.manual_seed(0)
    for _ in range(4):
        model(**inputs)[0].square().mean().backward()
    assert all(p.grad is not None for d in adapter.deltas() for p in d.parameters() if not hasattr(d, "name"))
    model.eval()
    if make is bert:
        return
    for name in ("0", "2") if make is not t5 else ("encoder.1", "decoder.2"):
        gw.graft(model, gw.DAS(skip_width=6, adapter_width=4, blocks=(name,)), name, head=False)
        spread(gw.adapters(model)[name], 0.1)
        given = {"input_ids": inputs["input_ids"], "max_new_tokens": 5, "do_sample": False}
        cached, plain = (model.generate(**given, use_cache=on) for on in (True, False))
        assert torch.equal(cached, plain)


def test_das__parameters():
    """n - k blocks with two adapters each, k with what stands in for them."""
    model, d, m, s = bert_of("base"), 768, 96, 192
    made, said = counts(model, gw.DAS())
    assert made == said == 8 * 2 * (2 * m * d + m + d) + 4 * (2 * s * d + s + d + 2 * d)
    assert counts(model, gw.DAS(blocks=("0", "11")))[0] == 10 * 2 * (2 * m * d + m + d) + 2 * (2 * s * d + s + 3 * d)


@pytest.mark.parametrize(
    ("make", "options", "what"),
    [
        (bert, {"k": 2}, "leave out 2 blocks"),
        (bert, {"blocks": ("7",)}, "'7'"),
        (t5, {"blocks": ("encoder.0",)}, "'encoder.0'"),  # it makes the position bias of all
        (vit, {"k": 0}, "k"),
        (vit, {"eta": -1.0}, "eta"),
    ],
)
def test_das__bad_input_is_refused(make, options, what):
    model = make()
    with pytest.raises(gw.GraftError, match=what):
        gw.graft(model, gw.DAS(**{"k": 1, **options}), head=False)
    assert not gw.adapters(model)


def test_das__a_search_that_never_runs_says_so(monkeypatch):
    monkeypatch.setattr("graftwork.methods.block.das.PATIENCE", 3)
    model, _ = adapted(k=1)
    model.train()
    with pytest.warns(UserWarning, match=r"gw\.calibrate"):
        for _ in range(3):
            model(images())


def test_das__rewards_are_exponentials_of_mean_losses():
    found = search(4, k=1, eta=2.0, turns=3)
    found.next_trial()
    trials = [list(t) for t in found._trials]
    losses = [[0.1, 0.3], [1.0, 2.0], [0.0, 0.0]]
    for given in losses:
        found.losses.extend(map(torch.tensor, given))
        if found.reward():
            found.next_trial()
    rewards = [math.exp(-sum(given) / 2) for given in losses]
    expected = torch.zeros(4)
    for (i,), r in zip(trials, rewards, strict=True):
        expected[i] += 2.0 * (r - sum(rewards) / 3) * 0.25
    torch.testing.assert_close(found.gates, expected)
    assert int(found.turns) == 1
