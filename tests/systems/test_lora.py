"""Hu et al. 2021: LoRA on linear layers; the forms of embeddings, convolutions, attention and experts; rsLoRA."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from adapter_models import bert, ids, llama, spread
from torch import nn
from weight_models import Attention, around, counts, dense, gpt2, gpt3, mixtral, roberta_of

import graftwork as gw
from graftwork.products.dropout import keep_mask

lora = pytest.mark.system("lora")
site_types = pytest.mark.system("lora-site-types")
parameters = pytest.mark.system("lora-target-parameters")
rslora = pytest.mark.system("rslora")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- lora -------------------------------------------------------------------------------------------------------------


@lora
@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_lora__identity_and_first_gradients(make):
    model, x = make(), ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.LoRA(r=3), head=False)
    assert torch.equal(model(x).logits, before)
    model(x).logits.square().mean().backward()
    for delta in adapter.deltas():
        assert torch.equal(delta.down.grad, torch.zeros_like(delta.down))
        assert delta.up.grad.abs().max() > 0


@lora
def test_lora__formula_with_dropout_on_the_thin_branch_only():
    torch.manual_seed(0)
    model = around(nn.Linear(6, 5))
    adapter = gw.graft(model, gw.LoRA(r=2, alpha=3.0, dropout=0.5, at="linear"), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    x = torch.randn(4, 6)
    base = F.linear(x, model.site.weight, model.site.bias)
    close(model(x), base + 1.5 * x @ delta.down.T @ delta.up.T)
    model.train()
    torch.manual_seed(5)
    out = model(x)
    torch.manual_seed(5)
    keep, share = keep_mask(x, 0.5)
    close(out, base + 1.5 * (x * keep / share) @ delta.down.T @ delta.up.T)
    with torch.no_grad():  # the same draw: what is run twice, checkpointed, drops the same
        torch.manual_seed(5)
        close(model(x), out)


@lora
@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_lora__merge_equals_forward_and_unmerge_restores(make):
    model, x = make(), ids()
    adapter = gw.graft(model, gw.LoRA(r=3), head=False)
    spread(adapter)
    kept = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        out = model(x).logits
        gw.merge(model)
        close(model(x).logits, out)
        gw.unmerge(model)
    assert all(torch.equal(p, kept[n]) for n, p in model.state_dict().items())
    # merged weights are no place to train: nothing in the model takes a gradient until they are unmerged
    gw.merge(model)
    assert not model.train()(x).logits.requires_grad
    gw.unmerge(model)
    assert model(x).logits.requires_grad


@lora
def test_lora__full_rank_reaches_any_update():
    torch.manual_seed(0)
    model = around(nn.Linear(7, 5))
    w, b = model.site.weight.detach().clone(), model.site.bias
    adapter = gw.graft(model, gw.LoRA(r=5, alpha=5.0, at="linear"), head=False)
    wanted = torch.randn(5, 7)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    (delta,) = adapter.deltas()
    delta.down.data, delta.up.data = v, u * s
    x = torch.randn(3, 7)
    close(model(x), F.linear(x, w + wanted, b))


@lora
def test_lora__counts():
    assert counts(roberta_of("base"), gw.LoRA(r=8)) == (294_912, 294_912)
    assert counts(gpt3(), gw.LoRA(r=1)) == (4_718_592, 4_718_592)
    assert counts(gpt3(), gw.LoRA(r=8)) == (37_748_736, 37_748_736)


@lora
def test_lora__scaling_is_alpha_over_r():
    assert gw.LoRA(r=8, alpha=16.0).scale == gw.LoRA(r=16, alpha=32.0).scale == 2.0


@lora
def test_lora__packed_qkv_equals_three_updates():
    model, x = gpt2(), ids()
    adapter = gw.graft(model, gw.LoRA(r=3, at="q, k, v"), head=False)
    spread(adapter)
    out = model(x).logits
    by_hand = gpt2()
    for layer in range(2):
        deltas = [adapter.parts[0].deltas[f"transformer.h.{layer}.attn.c_attn:{role}"] for role in "qkv"]
        update = torch.cat([d.scale * d.up @ d.down for d in deltas])  # [3 d, d]
        by_hand.transformer.h[layer].attn.c_attn.weight.data += update.T.detach()
    close(out, by_hand(x).logits)
    # with k left out, its rows are the backbone's
    model = gpt2()
    adapter = gw.graft(model, gw.LoRA(r=3, at="q, v"), head=False)
    spread(adapter)
    kept = model.transformer.h[0].attn.c_attn.weight.clone()
    gw.merge(model)
    merged = model.transformer.h[0].attn.c_attn.weight
    assert torch.equal(merged[:, 32:64], kept[:, 32:64])
    assert (merged - kept)[:, :32].abs().max() > 0
    assert (merged - kept)[:, 64:].abs().max() > 0


# --- other kinds of layers --------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "grouped": {"kernel_size": 3, "groups": 2},
    "pointwise": {"kernel_size": 1},
    "grouped pointwise": {"kernel_size": 1, "groups": 2},
    "all": {"kernel_size": 3, "groups": 2, "stride": 2, "dilation": 2, "padding": 2, "padding_mode": "reflect"},
}


@site_types
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_lora_site_types__convolutions(kind, rank):
    torch.manual_seed(0)
    cls = nn.Conv2d if rank == 2 else nn.Conv1d
    conv = cls(6, 8, **CONVOLUTIONS[kind])
    model, x = around(conv), torch.randn(2, 6, *[9] * rank)
    before = model(x)
    adapter = gw.graft(model, gw.LoRA(r=4, alpha=2.0, at="conv"), head=False)
    assert torch.equal(model(x), before)
    spread(adapter)
    (delta,) = adapter.deltas()
    out = model(x)
    # the update computed from the factors by itself: a convolution to rank r per group, then a pointwise one
    thin = cls(6, 4 * conv.groups, bias=False, **CONVOLUTIONS[kind])
    wide = cls(4 * conv.groups, 8, 1, groups=conv.groups, bias=False)
    with torch.no_grad():
        thin.weight.copy_(
            delta.down.view(4, 6 // conv.groups, *conv.kernel_size).repeat(conv.groups, *[1] * (rank + 1))
        )
        wide.weight.copy_(delta.up.view(8, 4, *[1] * rank))
    close(out, before + 0.5 * wide(thin(x)))
    with torch.no_grad():
        gw.merge(model)
    close(model(x), out)
    gw.unmerge(model)
    assert torch.equal(model(x), out)


@site_types
def test_lora_site_types__embedding_lookup():
    torch.manual_seed(0)
    model = around(nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 3))
    adapter = gw.graft(model, gw.LoRA(r=2, alpha=3.0, at="/site/"), head=False)
    (delta,) = adapter.deltas()
    assert delta.down.shape == (2, 11)
    assert delta.up.shape == (6, 2)
    assert not delta.down.any()
    assert delta.up.std() > 0.3
    tokens = torch.tensor([[1, 0, 4], [10, 4, 4]])
    table = model.site.weight
    assert torch.equal(model(tokens), model.last(table[tokens]))
    spread(adapter)
    e = (table + 1.5 * (delta.up @ delta.down).T)[tokens]
    close(model(tokens), model.last(e))
    close(e, table[tokens] + 1.5 * delta.down.T[tokens] @ delta.up.T)
    assert adapter.num_parameters == 2 * (11 + 6)


@site_types
@pytest.mark.parametrize("at", ["q, k, v", "q, v", "o", "qkv, o"])
def test_lora_site_types__multihead_attention(at):
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 5, 12)
    reference = copy.deepcopy(model)
    adapter = gw.graft(model, gw.LoRA(r=3, at=at), head=False)
    close(model(x), reference(x), 1e-6)
    spread(adapter)
    with torch.no_grad():
        for key, delta in adapter.parts[0].deltas.items():
            update = delta.scale * delta.up @ delta.down
            a, b = delta.view.rows or (0, update.shape[0])
            target = reference.attn.out_proj.weight if "out_proj" in key else reference.attn.in_proj_weight
            target[a:b] += update
    close(model(x), reference(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    with torch.no_grad():
        out = model(x)
        gw.merge(model)
        close(model(x), out)


@site_types
def test_lora_site_types__transposed_linear_of_gpt2():
    model, x = gpt2(), ids()
    adapter = gw.graft(model, gw.LoRA(r=3, at="up, down, o"), head=False)
    assert {(d.down.shape[1], d.up.shape[0]) for d in adapter.deltas()} == {(32, 128), (128, 32), (32, 32)}
    spread(adapter, 0.1)
    out, w = model(x).logits, dense(model, "transformer.h.0.mlp.c_fc:up").clone()
    delta = adapter.parts[0].deltas["transformer.h.0.mlp.c_fc:up"]
    gw.merge(model)
    close(model(x).logits, out, 1e-4)
    close(dense(model, "transformer.h.0.mlp.c_fc:up"), w + delta.scale * delta.up @ delta.down)


# --- experts ----------------------------------------------------------------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts"


@parameters
def test_lora_target_parameters__one_pair_per_expert():
    model, x = mixtral(), ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.LoRA(r=2, at="expert.gate_up, expert.down"), head=False)
    close(model(x).logits, before, 1e-6)
    spread(adapter, 0.5)
    by_hand = mixtral()
    holder = by_hand.get_submodule(EXPERTS)
    with torch.no_grad():
        for name, role in (("gate_up_proj", "expert.gate_up"), ("down_proj", "expert.down")):
            delta = adapter.parts[0].deltas[f"{EXPERTS}:{role}:{name}"]
            together = delta.scale * torch.einsum("eor,eri->eoi", delta.up, delta.down)
            for e in range(4):
                close(together[e], delta.scale * delta.up[e] @ delta.down[e])
                holder._parameters[name][e] += delta.scale * delta.up[e] @ delta.down[e]
    close(model(x).logits, by_hand(x).logits)
    assert (by_hand(x).logits - before).abs().max() > 1e-3
    assert adapter.num_parameters == 4 * 2 * ((16 + 48) + (24 + 16))


@parameters
def test_lora_target_parameters__grouped_equals_one_by_one():
    outs = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = mixtral(implementation=implementation)
        adapter = gw.graft(model, gw.LoRA(r=2, at="expert.gate_up, expert.down"), head=False)
        spread(adapter, 0.5)
        outs[implementation] = model(ids()).logits
    close(outs["batched_mm"], outs["eager"])
    close(outs["grouped_mm"], outs["eager"])


@parameters
def test_lora_target_parameters__no_gradient_where_no_token_went():
    model, x = mixtral(experts=6), ids(batch=1, seq=3)
    adapter = gw.graft(model, gw.LoRA(r=2, at="expert.gate_up, expert.down"), head=False)
    spread(adapter, 0.5)
    chosen: set[int] = set()
    router = model.model.layers[0].mlp.gate
    handle = router.register_forward_hook(lambda module, args, out: chosen.update(out[-1].flatten().tolist()))
    model(x).logits.square().mean().backward()
    handle.remove()
    assert 0 < len(chosen) < 6
    for p in adapter.parameters():
        for e in range(6):
            assert bool(p.grad[e].any()) == (e in chosen)


@parameters
def test_lora_target_parameters__keys_are_names(tmp_path):
    model, x = mixtral(), ids()
    adapter = gw.graft(model, gw.LoRA(r=2, at="expert.gate_up, expert.down"), "a", head=False)
    spread(adapter, 0.5)
    homes = {name.rsplit("/", 1)[0] for name in adapter.state_dict()}
    assert homes == {f"0/{EXPERTS}:expert.gate_up:gate_up_proj", f"0/{EXPERTS}:expert.down:down_proj"}
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    again = mixtral()
    gw.load(again, tmp_path / "a")
    assert torch.equal(again(x).logits, out)


# --- rslora -----------------------------------------------------------------------------------------------------------


@rslora
def test_rslora__equals_lora_with_alpha_times_root_r():
    outs = []
    for method in (gw.LoRA(r=4, alpha=6.0, rslora=True), gw.LoRA(r=4, alpha=12.0)):
        model = llama()
        spread(gw.graft(model, method, head=False, seed=1))
        outs.append(model(ids()).logits)
    assert torch.equal(*outs)


@rslora
def test_rslora__size_of_the_update_does_not_depend_on_r():
    """A fan-in scaled, B of unit variance: E |B A x|^2 grows like r; alpha^2 / r keeps it, alpha^2 / r^2 does not."""
    sizes = {}
    for flag in (True, False):
        for r in (4, 16, 64, 256):
            model = around(nn.Linear(256, 256, bias=False))
            adapter = gw.graft(model, gw.LoRA(r=r, alpha=4.0, rslora=flag, at="linear"), head=False)
            (delta,) = adapter.deltas()
            g = torch.Generator().manual_seed(r)
            x = torch.randn(512, 256, generator=g)
            delta.down.data = torch.randn(r, 256, generator=g) / 16
            delta.up.data = torch.randn(256, r, generator=g)
            with torch.no_grad():
                change = model(x) - F.linear(x, model.site.weight)
            sizes[flag, r] = change.square().mean().item()
    for r in (16, 64, 256):
        assert sizes[True, r] / sizes[True, 4] == pytest.approx(1, rel=0.5)
    assert sizes[False, 256] / sizes[False, 4] == pytest.approx(1 / 64, rel=0.5)


@rslora
def test_rslora__a_file_keeps_the_scale(tmp_path):
    model, x = bert(), ids()
    adapter = gw.graft(
        model, [gw.LoRA(r=4, rslora=True, at="q"), gw.LoRA(r=9, alpha=2.0, rslora=True, at="v")], "a", head=False
    )
    spread(adapter)
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    again = bert()
    loaded = gw.load(again, tmp_path / "a")
    assert torch.equal(again(x).logits, out)
    assert {d.scale for d in loaded.deltas()} == {16 / 2, 2 / 3}
