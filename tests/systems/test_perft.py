"""Liu et al. 2024: adapters beside and inside of the experts of a frozen mixture-of-experts layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from adapter_models import bert, closed_form, ids, llama, on_meta, spread

import graftwork as gw
from graftwork.core.errors import GraftError

pytestmark = pytest.mark.system("perft")
TINY = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VARIANTS = ["R", "E", "D", "S"]


def olmoe(experts: int = 6):
    torch.manual_seed(0)
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**TINY, num_experts=experts)).eval()


def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=6)).eval()


def gpt_oss():
    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TINY, num_local_experts=6, head_dim=8)).eval()


def deepseek():
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **TINY | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=6, n_group=1, topk_group=1,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config).eval()


BACKBONES = [olmoe, mixtral, gpt_oss, deepseek]


def logits(model, **more):
    with torch.no_grad():
        return model(ids(), **more).logits


def layer(model):
    """The mixture-of-experts layer of the topmost block, and its states and output in a pass."""
    block, seen = model.model.layers[-1].mlp, []
    hook = block.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    logits(model)
    hook.remove()
    (h, y), *_ = seen
    return h, y[0] if isinstance(y, tuple) else y


# -- 1. the identity


@pytest.mark.parametrize("make", BACKBONES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("unit", ["lora", "adapter"])
def test_perft__starts_as_the_backbone(make, variant, unit):
    model = make()
    base = logits(model)
    adapter = gw.graft(model, gw.PERFT(variant=variant, r=4, unit=unit), head=False)
    for name, p in adapter.named_parameters():
        if name.endswith("router.weight"):
            assert 0.01 < p.std() < 0.03
            p.data *= 100
    assert torch.equal(logits(model), base)
    spread(adapter)
    assert (logits(model) - base).abs().max() > 1e-3


def test_perft__the_backbones_router_sees_what_it_saw():
    model = olmoe()
    before = logits_of_router(model)
    gw.graft(model, gw.PERFT(r=4), head=False)
    assert torch.equal(logits_of_router(model), before)
    spread(
        gw.graft(model, gw.PERFT(r=4, layers="-1"), "b", head=False)
    )  # the topmost layer: no router stands behind it
    assert torch.equal(logits_of_router(model), before)


def logits_of_router(model):
    return torch.stack(model(ids(), output_router_logits=True).router_logits)


# -- 2. the variants against their equations


@pytest.mark.parametrize("make", BACKBONES)
@pytest.mark.parametrize("unit", ["lora", "adapter"])
def test_perft__r_is_its_equation(make, unit):
    model = make()
    _, y0 = layer(model)
    options = {"r": 4, "experts": 5, "top_k": 2, "alpha": 6.0, "unit": unit}
    spread(gw.graft(model, gw.PERFT(layers="-1", **options), head=False))
    h, y = layer(model)
    (delta,) = gw.adapters(model)["default"].deltas()
    q = (h @ delta.router.weight.T).softmax(-1)
    best = q.topk(2, -1)
    expected = y0.clone()
    for j, expert in enumerate(delta.experts):
        inner = h @ expert.down.T
        effect = 1.5 * inner @ expert.up.T if unit == "lora" else F.silu(inner) @ expert.up.T
        weight = (best.values * (best.indices == j)).sum(-1, keepdim=True)
        expected = expected + weight * effect
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", BACKBONES)
@pytest.mark.parametrize("act", ["none", "silu"])
def test_perft__e_is_its_equation(make, act):
    model = make()
    _, y0 = layer(model)
    spread(gw.graft(model, gw.PERFTE(r=4, scale=1.5, act=act, layers="-1"), head=False))
    seen = []
    experts = model.model.layers[-1].mlp.experts
    hook = experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    h, y = layer(model)
    hook.remove()
    _, chosen, p = seen[0]
    (delta,) = gw.adapters(model)["default"].deltas()
    expected = y0.reshape(-1, 32).clone()
    flat = h.reshape(-1, 32)
    for t in range(len(flat)):
        for k in range(2):
            i = chosen[t, k]
            inner = delta.down[i] @ flat[t]
            expected[t] += p[t, k] * 1.5 * (inner if act == "none" else F.silu(inner)) @ delta.up[i]
    torch.testing.assert_close(y.reshape(-1, 32), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("unit", ["lora", "adapter"])
def test_perft__d_is_the_sum_of_its_adapters(unit):
    model = olmoe()
    _, y0 = layer(model)
    spread(gw.graft(model, gw.PERFT("D", r=4, experts=3, alpha=6.0, unit=unit, layers="-1"), head=False))
    h, y = layer(model)
    (delta,) = gw.adapters(model)["default"].deltas()
    expected = y0
    for d, u in zip(delta.down.split(4), delta.up.split(4, dim=1), strict=True):
        expected = expected + (1.5 * h @ d.T @ u.T if unit == "lora" else F.silu(h @ d.T) @ u.T)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


def test_perft__one_routed_adapter_is_the_shared_one():
    outputs = []
    for method in (gw.PERFT("R", r=4, experts=1, top_k=1), gw.PERFT("S", r=4), gw.PERFT("D", r=4, experts=1)):
        model = olmoe()
        spread(gw.graft(model, method, head=False))
        outputs.append(logits(model))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


# -- 3. and 4. who learns


def test_perft__the_own_router_learns_from_the_task_alone():
    model = olmoe()
    adapter = gw.graft(model, gw.PERFT(r=4, balance=0.0), head=False)
    spread(adapter)
    model.train()(ids(), labels=ids()).loss.backward()
    assert gw.auxiliary_loss(model) == 0.0
    assert all(delta.router.weight.grad.abs().max() > 1e-6 for delta in adapter.deltas())
    assert all(p.grad is None for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))


def test_perft__balance_is_of_the_own_router():
    model = olmoe()
    adapter = gw.graft(model, gw.PERFT(r=4, balance=0.01, layers="-1"), head=False)
    for delta in adapter.deltas():
        delta.router.weight.data.zero_()
    model.train()(ids())
    torch.testing.assert_close(gw.auxiliary_loss(model), torch.tensor(0.01))


def test_perft__an_expert_that_no_token_chose_does_not_learn():
    model = olmoe()
    adapter = gw.graft(model, gw.PERFTE(r=4), head=False)
    spread(adapter)
    chosen = []
    hooks = [
        block.mlp.experts.register_forward_pre_hook(lambda m, args: chosen.append(set(args[1].flatten().tolist())))
        for block in model.model.layers
    ]
    model(ids(1, 1), labels=ids(1, 1)).logits.square().sum().backward()
    for hook in hooks:
        hook.remove()
    for delta, who in zip(adapter.deltas(), chosen, strict=True):
        assert len(who) == 2
        for i in range(6):
            assert bool(delta.up.grad[i].any()) == bool(delta.down.grad[i].any()) == (i in who)


# -- parameters


def test_perft__parameters_of_olmoe_1b_7b():
    config = transformers.OlmoeConfig(
        hidden_size=2048, num_hidden_layers=16, num_experts=64, intermediate_size=1024, num_attention_heads=16
    )
    model = on_meta(lambda: transformers.OlmoeForCausalLM(config))
    for i, (method, expected) in enumerate(
        [
            (gw.PERFT("R", r=16, experts=4), 4_325_376),
            (gw.PERFT("E", r=4), 16_777_216),
            (gw.PERFT("D", r=16, experts=4), 16 * 4 * 2 * 2048 * 16),
            (gw.PERFT("S", r=16), 16 * 2 * 2048 * 16),
        ]
    ):
        assert closed_form(model, method) == expected
        assert gw.graft(model, method, str(i), head=False).num_parameters == expected


# -- files, generation, refusals


@pytest.mark.parametrize("variant", VARIANTS)
def test_perft__comes_back_from_a_file_and_generates(variant, tmp_path):
    model = mixtral()
    spread(gw.graft(model, gw.PERFT(variant, r=4), "p", head=False))
    gw.save(model, "p", tmp_path / "p")
    other = mixtral()
    gw.load(other, tmp_path / "p")
    assert torch.equal(logits(other), logits(model))
    given = {"max_new_tokens": 4, "do_sample": False}
    cached, plain = (model.generate(ids(), use_cache=c, **given) for c in (True, False))
    assert torch.equal(cached, plain)
    with pytest.raises(GraftError, match="merge"):
        gw.merge(model)


@pytest.mark.parametrize("variant", ["R", "D", "S"])
def test_perft__rows_of_a_batch_have_their_own(variant):
    model = olmoe()
    for name, std in (("a", 0.2), ("b", 0.4)):
        spread(gw.graft(model, gw.PERFT(variant, r=4), name, head=False), std)
    apart = []
    for row, name in enumerate("ab"):
        with gw.using(model, name), torch.no_grad():
            apart.append(model(ids()[row : row + 1]).logits)
    with gw.using(model, gw.rows(["a", "b"])), torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, torch.cat(apart), atol=1e-5, rtol=1e-4)


def test_perft__rows_inside_of_experts_are_refused():
    """There the tokens of all rows are one list."""
    model = olmoe()
    for name in "ab":
        gw.graft(model, gw.PERFTE(r=4), name, head=False)
    with pytest.raises(GraftError, match="changes the whole pass"):
        gw.activate(model, gw.rows(["a", "b"]))


def test_perft__refusals():
    with pytest.raises(GraftError, match="variant"):
        gw.PERFT("X")
    with pytest.raises(GraftError, match="expert"):
        gw.graft(llama(), gw.PERFT("E"), head=False)
    with pytest.raises(GraftError, match="reads the output"):
        gw.graft(bert(), gw.Mixture(of=gw.Bottleneck(d=4, at="mlp"), router="input"), head=False)
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=60,
        d_model=32,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        num_experts=3,
        num_sparse_encoder_layers=1,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(GraftError, match="a module of its own"):
        gw.graft(model, gw.PERFT("E"), head=False)
    assert not gw.adapters(model)
    gw.graft(model, gw.PERFT("R", r=4), head=False)
