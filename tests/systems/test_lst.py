"""Ladder side-tuning (Sung et al. 2022): the acceptance checks of the catalogue."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from attention_models import batch, decode, make, run, scatter
from torch import Tensor

import graftwork as gw
from graftwork.methods.side.forms.importance import fisher, reprune

pytestmark = pytest.mark.system("lst")
KINDS = ["bert", "llama", "gpt2", "t5", "bart", "vit", "whisper", "torch"]


def grafted(kind: str, depth: int = 4, seed: int | None = 3, **given: Any) -> tuple[Any, Any]:
    """A model of four blocks with a ladder of three side blocks, all values random."""
    both = {"encoder_layers": depth, "decoder_layers": depth}
    known = {"gpt2": {"n_layer": depth}, "t5": {"num_layers": depth}, "bart": both, "whisper": both, "torch": {}}
    layers = known.get(kind, {"num_hidden_layers": depth})
    model = make(kind, **layers)
    adapter = gw.graft(model, gw.Ladder(**{"r": 4, "drop": 2 if kind == "torch" else 4} | given), head=False)
    if seed is not None:
        scatter(adapter, seed=seed)
        for delta in adapter.deltas():  # gates that are neither open nor shut
            if getattr(delta, "gate", None) is not None:
                delta.gate.data.mul_(0.2)
    return model.eval(), adapter


def rungs(adapter: Any) -> list[Any]:
    return [d for d in adapter.deltas() if getattr(d, "side", None) is not None]


def tops(adapter: Any) -> list[Any]:
    return [d for d in adapter.deltas() if hasattr(d, "up")]


def climb_states(adapter: Any) -> dict[str, list[Tensor]]:
    """s_i of every block, noted while a pass runs, by tower trail."""
    seen: dict[str, list[Tensor]] = {}
    for delta in adapter.deltas():
        if hasattr(delta, "climb") and not hasattr(delta, "up"):

            def noted(*args: Any, delta: Any = delta, climb: Any = delta.climb) -> Tensor:
                s = climb(*args)
                seen.setdefault(delta.trail, []).append(s)
                return s

            delta.climb = noted
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_lst__nothing_goes_back_through_the_backbone(kind: str) -> None:
    model, adapter = grafted(kind)
    given = batch(kind)
    entered: list[Tensor] = []
    seen: list[Tensor] = []
    of_backbone: list[Tensor] = []  # held, so that no storage is used twice
    mine = {id(m) for delta in adapter.deltas() for m in delta.modules()}

    def outputs(module: Any, args: Any, out: Any) -> None:
        parts = (
            [out]
            if isinstance(out, Tensor)
            else out.values()
            if hasattr(out, "values")
            else out
            if isinstance(out, tuple)
            else []
        )
        of_backbone.extend(t.detach() for t in parts if isinstance(t, Tensor))

    def note(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    for delta in adapter.deltas():
        for name in ("down", "first"):
            if getattr(delta, name, None) is not None:
                getattr(delta, name).register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    body = {"llama": "model", "gpt2": "transformer", "bart": "model", "whisper": "model"}.get(kind)
    stack = getattr(model, body) if body else model
    ends = {id(d) for d in tops(adapter)}
    for path, module in stack.named_modules():
        inside = any(part in ("classifier", "lm_head", "pooler", "graft") for part in path.split("."))
        if path and id(module) not in mine | ends and not inside and not list(module.children()):
            module.register_forward_hook(outputs)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = run(stack, given, grad=True)
    assert entered and all(not h.requires_grad and h.grad_fn is None for h in entered)

    def where(tensors: list[Tensor]) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in tensors}

    kept = where(seen) & where(of_backbone) - where(entered)
    # beyond the inputs of D_i: the last state, which the gate of the top mixes in
    assert len(kept) <= 1
    out.pow(2).mean().backward()
    own = {id(p) for p in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_lst__a_shut_last_gate_is_the_backbone(kind: str) -> None:
    model, adapter = grafted(kind)
    given = batch(kind)
    with gw.using(model, None):
        plain = run(model.train(), given) if kind == "torch" else run(model, given)
    model.eval()
    assert (run(model, given) - plain).abs().max() > 1e-3
    for top in tops(adapter):
        if top.gate is not None:
            top.gate.data.fill_(-1e4)
    if kind == "torch":  # in eval mode nn.MultiheadAttention takes a fused kernel, which rounds otherwise
        torch.testing.assert_close(run(model, given), plain)
    else:
        assert torch.equal(run(model, given), plain)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_lst__a_shut_gate_forgets_the_state_below(kind: str) -> None:
    model, adapter = grafted(kind)
    given = batch(kind)
    towers: dict[str, list[Any]] = {}
    for rung in rungs(adapter):
        towers.setdefault(rung.trail, []).append(rung)
    upper = [stack[1] for stack in towers.values()]  # the second side block of each tower
    states = climb_states(adapter)

    def second(moved: float) -> list[Tensor]:
        states.clear()
        for d in adapter.deltas():
            if getattr(d, "first", None) is not None:
                d.first.bias.data.add_(moved * torch.linspace(-1, 1, 8))
        if kind == "t5":  # the decoder's cross-attention may not move either
            for d in tops(adapter):
                if d.up is None:
                    d.weight.data.zero_()
        run(model, given)
        return [s[2] for s in states.values()]  # block 0 has no side block

    before, after = second(0.0), second(1.0)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, after, strict=True))
    for rung in upper:
        rung.gate.data.fill_(-1e4)
    before, after = second(0.0), second(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5", "bart", "vit", "whisper"])
@pytest.mark.parametrize("mix", ["before", "after"])
def test_lst__full_width_with_copied_weights_is_the_backbone(kind: str, mix: str) -> None:
    model, adapter = grafted(kind, seed=None, r=1, drop=0, init="pruning", mix=mix)
    given = batch(kind)
    for delta in adapter.deltas():
        if getattr(delta, "first", None) is not None:
            delta.first.weight.data.copy_(torch.eye(32))
        if getattr(delta, "gate", None) is not None:
            delta.gate.data.fill_(1e4)
        if getattr(delta, "up", None) is not None:
            delta.up.weight.data.copy_(torch.eye(32))
    wide = {site.path: site.module for site in adapter.sites}
    for site, top in zip(adapter.sites, adapter.deltas(), strict=True):
        if hasattr(top, "up") and site.module.__class__.__name__.lower().endswith("norm"):
            top.weight.data.copy_(wide[site.path].weight)
            if top.bias is not None:
                top.bias.data.copy_(wide[site.path].bias)
    states = climb_states(adapter)
    blocks: dict[str, list[Tensor]] = {}
    for rung in rungs(adapter):
        module = wide[rung.key.rpartition(":")[0]]
        module.register_forward_hook(
            lambda m, a, out, trail=rung.trail: blocks.setdefault(trail, []).append(
                out if isinstance(out, Tensor) else out[0]
            )
        )
    with torch.no_grad():
        if kind == "bart":  # no last norm: the side encoder's own one would change what the side decoder sees
            model.model.encoder.register_forward_hook(lambda m, a, out: out)
            memory = adapter.parts[0].shared_modules["memory"]
            memory.of = lambda encoded, state: encoded
        run(model, given)
    assert blocks.keys() == states.keys()
    for trail, outs in blocks.items():
        assert len(outs) == len(states[trail]) == 4
        if kind in ("bert", "bart"):  # without a last norm the last block's output is the mixed one
            outs, states[trail] = outs[:-1], states[trail][:-1]
        for h, s in zip(outs, states[trail], strict=True):
            torch.testing.assert_close(s, h, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "whisper"])
def test_lst__full_width_open_gates_and_copied_norm_give_the_logits(kind: str) -> None:
    model, adapter = grafted(kind, seed=None, r=1, drop=0, init="pruning")
    given = batch(kind)
    with gw.using(model, None):
        plain = run(model, given)
    modules = {site.key: site.module for site in adapter.sites}
    for delta in adapter.deltas():
        if getattr(delta, "first", None) is not None:
            delta.first.weight.data.copy_(torch.eye(32))
        if getattr(delta, "gate", None) is not None:
            delta.gate.data.fill_(1e4)
        if hasattr(delta, "up"):
            delta.weight.data.copy_(modules[delta.key].weight)
            if delta.bias is not None:
                delta.bias.data.copy_(modules[delta.key].bias)
            if delta.up is not None:
                delta.up.weight.data.copy_(torch.eye(32))
    torch.testing.assert_close(run(model, given), plain, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5", "vit"])
def test_lst__pruning_keeps_the_same_channels_in_every_layer(kind: str) -> None:
    model = make(kind)
    numbers = torch.arange(1, 33).float()
    for name, p in model.named_parameters():  # norm scales that say which channel they belong to
        if p.shape == (32,) and name.endswith("weight"):
            p.data.copy_(numbers)
    adapter = gw.graft(model, gw.Ladder(r=4, drop=0, init="pruning"), head=False)
    kept = []
    for rung in rungs(adapter):
        for name, p in rung.side.named_parameters():
            if p.shape == (8,) and name.endswith("weight"):
                kept.append(p.detach())
    assert len(kept) >= 4 and kept[0].unique().numel() == 8
    assert all(torch.equal(k, kept[0]) for k in kept)
    if kind == "llama":
        residual = kept[0].long() - 1
        for rung, block in zip(rungs(adapter), model.model.layers, strict=True):
            up = rung.side.mlp.up_proj.weight
            score = (
                block.mlp.up_proj.weight.abs().sum(1)
                * block.mlp.gate_proj.weight.abs().sum(1)
                * block.mlp.down_proj.weight.abs().sum(0)
            )
            rows = score.topk(16).indices.sort().values
            assert torch.equal(up, block.mlp.up_proj.weight[rows][:, residual])
            assert torch.equal(rung.side.mlp.down_proj.weight, block.mlp.down_proj.weight[residual][:, rows])
            value = rung.side.self_attn.v_proj.weight  # two key heads of 8 become two of 2
            full = block.self_attn.v_proj.weight[:, residual].view(2, 8, 8)
            assert all(
                any(torch.equal(row, wide) for wide in full[h]) for h in (0, 1) for row in value.view(2, 2, 8)[h]
            )


def test_lst__rotary_heads_stay_even() -> None:
    """Four heads of 6 become four of 4, not of 3: rotary positions turn pairs."""
    model, given = make("llama", hidden_size=24, num_hidden_layers=1), batch("llama")
    adapter = gw.graft(model, gw.Ladder(r=2, drop=0, init="pruning"))
    (rung,) = rungs(adapter)
    assert rung.side.self_attn.q_proj.weight.shape == (16, 12)
    wide = model.model.layers[0].self_attn.q_proj.weight.view(4, 6, 24)
    for head, thin in zip(wide, rung.side.self_attn.q_proj.weight.view(4, 4, 12), strict=True):
        assert all(any(set(row.tolist()) <= set(whole.tolist()) for whole in head) for row in thin)
    assert adapter.num_parameters == sum(map(adapter.methods[0].count, adapter.sites))
    assert torch.isfinite(run(model, given)).all()


def test_lst__pruning_by_fisher_information() -> None:
    model = make("bert")

    def loss(m: Any, given: Any) -> Tensor:
        return run(m, given, grad=True)[..., :8].pow(2).mean()

    importance = fisher(model, [batch("bert", seed=i) for i in range(3)], loss)
    one = fisher(model, [batch("bert", seed=0)], loss)
    loss(model, batch("bert", seed=0)).backward()
    name = "encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(one[name], dict(model.named_parameters())[name].grad.square())
    model.zero_grad()
    adapter = gw.graft(model, gw.Ladder(r=4, drop=0, init="pruning"), head=False)
    by_size = {k: v.clone() for k, v in adapter.state_dict().items()}
    reprune(adapter, importance)
    by_fisher = adapter.state_dict()
    assert any(not torch.equal(by_size[k], by_fisher[k]) for k in by_size)
    reprune(adapter, {n: p.detach().abs() for n, p in model.named_parameters()})
    again = adapter.state_dict()
    assert all(torch.equal(by_size[k], again[k]) for k in by_size)


def test_lst__counts_of_t5_base() -> None:
    with torch.device("meta"):
        model = T.T5ForConditionalGeneration(
            T.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
        )
    base = sum(p.numel() for p in model.parameters())
    adapter = gw.graft(model, gw.Ladder(r=8))
    method = adapter.methods[0]
    total = adapter.num_parameters
    assert total == sum(map(method.count, adapter.sites)) + method.count_shared(adapter.sites)
    thin, d = 96, 768
    attention, ff, norm, bias = 4 * thin * 96, 2 * thin * 384, thin, 32 * 12
    encoder = 9 * (attention + ff + 2 * norm) + bias
    decoder = 9 * (2 * attention + ff + 3 * norm) + bias
    rungs = 18 * (d * thin + thin + 1) + 2 * (d * thin + thin)
    ends = 2 * norm + (thin * d + d) + 1
    assert total == encoder + decoder + rungs + ends
    kept = [site.layer for site in adapter.sites if site.role == "block" and method.keeps(site.layer)]
    assert kept == 2 * [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert abs(total - 3.879e6) < 5e3
    assert round(100 * total / base, 2) == 1.74


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_lst__generation_with_and_without_cache_agree(kind: str, beams: int) -> None:
    model, adapter = grafted(kind)
    for rung in rungs(adapter):  # the side network, not the backbone, decides
        rung.gate.data.fill_(0.02)
    for top in tops(adapter):
        if top.gate is not None:
            top.gate.data.fill_(0.2)
    given = {k: v for k, v in batch(kind).items() if k != "decoder_input_ids"}
    torch.testing.assert_close(
        decode(model, given, num_beams=beams),
        decode(model, given, use_cache=False, num_beams=beams),
        atol=1e-4,
        rtol=1e-4,
    )
    with gw.using(model, None):
        plain = decode(model, given)
    assert (decode(model, given) - plain).abs().max() > 1e-2


def test_lst__static_cache_is_refused() -> None:
    model, _ = grafted("llama")
    with pytest.raises(gw.GraftError, match="dynamic cache"):
        decode(model, batch("llama"), cache_implementation="static")


def test_lst__states_of_another_encoder_pass_are_refused() -> None:
    model, _ = grafted("t5")
    given = batch("t5")
    with torch.no_grad():
        encoded = model.get_encoder()(given["input_ids"], given["attention_mask"])
        apart = model(encoder_outputs=encoded, **{k: v for k, v in given.items() if k != "input_ids"}).logits
        torch.testing.assert_close(apart, run(model, given))
        encoded.last_hidden_state = encoded.last_hidden_state + 1
        with pytest.raises(gw.GraftError, match="side encoder did not see"):
            model(encoder_outputs=encoded, **{k: v for k, v in given.items() if k != "input_ids"})


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "vit"])
def test_lst__checkpointing_copies_and_compilation(kind: str) -> None:
    model, adapter = grafted(kind)
    given = batch(kind)
    wanted = run(model, given)
    assert torch.equal(run(copy.deepcopy(model), given), wanted)
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="eager"), given), wanted)
    model.train()

    def gradients() -> list[Tensor]:
        run(model, given, grad=True).pow(2).mean().backward()
        found = [p.grad.clone() for p in adapter.parameters()]
        model.zero_grad()
        return found

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
def test_lst__a_padded_row_equals_the_row_alone(kind: str) -> None:
    model, _ = grafted(kind)
    given = batch(kind, side="right")
    alone = {k: v[1:, :4] if v.shape[1] == 6 else v[1:] for k, v in given.items()}
    out = run(model, given)[1]
    torch.testing.assert_close(out if kind == "t5" else out[:4], run(model, alone)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_lst__file_gives_the_adapter_back(kind: str, tmp_path: Path) -> None:
    model, _ = grafted(kind)
    given = batch(kind)
    gw.save(model, "default", tmp_path)
    fresh = make(kind, num_hidden_layers=4) if kind == "llama" else make(kind, num_layers=4)
    gw.load(fresh, tmp_path)
    assert torch.equal(run(fresh, given), run(model, given))


def test_lst__grafting_leaves_the_global_generator_alone() -> None:
    model = make("llama")
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    gw.graft(model, gw.Ladder(r=4, drop=0), seed=1)
    assert torch.equal(torch.rand(3), wanted)
    twin = make("llama")
    gw.graft(twin, gw.Ladder(r=4, drop=0), seed=1)
    given = batch("llama")
    assert torch.equal(run(twin, given), run(model, given))
    with pytest.raises(gw.GraftError, match="divides"):
        gw.graft(make("llama"), gw.Ladder(r=3))


def test_lst__side_heads_take_the_thin_rotation() -> None:
    """A side block of Llama rotates by the frequencies of its own head width."""
    rung = rungs(grafted("llama")[1])[0]
    positions = torch.arange(5)[None]
    cos, _ = rung.rotation(torch.zeros(1, 5, 8), positions)
    frequency = 1.0 / 10_000 ** (torch.arange(0, 2, 2).float() / 2)
    torch.testing.assert_close(cos[0], torch.cos(positions[0][:, None] * frequency).repeat(1, 2))
    assert F.cosine_similarity(cos[0, 1], cos[0, 2], dim=0) < 1.0
