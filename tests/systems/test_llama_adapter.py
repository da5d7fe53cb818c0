"""LLaMA-Adapter (Zhang et al. 2023): the acceptance checks of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from attention_models import batch, decode, make, run, scatter
from torch import Tensor

import graftwork as gw
from graftwork.core.attention import Attention, projected

pytestmark = pytest.mark.system("llama-adapter")
FORMS = [gw.LlamaAdapter(3), gw.LlamaAdapter(3, gate="scalar", squash="none")]


def llama_7b() -> Any:
    with torch.device("meta"):
        return T.LlamaForCausalLM(
            T.LlamaConfig(
                hidden_size=4096,
                num_hidden_layers=32,
                num_attention_heads=32,
                intermediate_size=11008,
                vocab_size=32000,
            )
        )


@pytest.mark.parametrize("made", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "t5"])
def test_llama_adapter__identity_and_first_gradients(made: gw.LlamaAdapter, kind: str) -> None:
    model, given = make(kind), batch(kind)
    plain = run(model, given)
    adapter = gw.graft(model, made, head=False)
    deltas: list[Any] = list(adapter.deltas())
    for i, delta in enumerate(deltas):
        with torch.no_grad():  # any P
            delta.prompt.copy_(torch.randn(delta.prompt.shape, generator=torch.Generator().manual_seed(i)) * 3)
    assert torch.equal(run(model, given), plain)
    run(model, given, grad=True).pow(2).mean().backward()
    for delta in deltas:
        assert (delta.gate.grad != 0).all()
        assert torch.equal(delta.prompt.grad, torch.zeros_like(delta.prompt))


@pytest.mark.parametrize("made", FORMS, ids=str)
@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("pad", [0, 2])
def test_llama_adapter__additive_form_equals_the_concatenated_form(made: gw.LlamaAdapter, how: str, pad: int) -> None:
    """[tanh(g) softmax(S_p), softmax(S_t)] [V_p; V] in one product, as the authors compute it: causal, grouped
    queries, left padding."""
    model, given = make("llama", num_hidden_layers=1), batch("llama", pad=pad)
    model.set_attn_implementation(how)
    (delta,) = gw.graft(model, made).deltas()
    assert isinstance(delta, torch.nn.Module)
    scatter(gw.adapters(model)["default"], 0.7)
    caught: dict[str, Any] = {}
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(
        lambda m, args, kwargs, out: caught.update(kwargs, x=kwargs["hidden_states"], out=out[0]), with_kwargs=True
    )
    run(model, given)
    with torch.no_grad(), gw.using(model, None):
        x = caught["x"]
        q, k, v = (
            f(x).view(2, 6, -1, 8).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = T.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, *caught["position_embeddings"])
        k_p, v_p = (
            f(delta.prompt).view(1, 3, 2, 8).transpose(1, 2).expand(2, -1, -1, -1)
            for f in (attention.k_proj, attention.v_proj)
        )
        k, v, k_p, v_p = (t.repeat_interleave(2, 1) for t in (k, v, k_p, v_p))
        visible = torch.ones(6, 6, dtype=torch.bool).tril() & given["attention_mask"].bool()[:, None, None]
        on_tokens = (q @ k.mT * 8**-0.5).masked_fill(~visible, -torch.inf).softmax(-1)
        on_prompt = (q @ k_p.mT * 8**-0.5).softmax(-1)
        gate = delta.gate.tanh() if made.squash == "tanh" else delta.gate
        weights = torch.cat([gate.view(1, -1, 1, 1) * on_prompt, on_tokens], -1)
        wanted = attention.o_proj((weights @ torch.cat([v_p, v], 2)).transpose(1, 2).reshape(2, 6, 32))
    real = given["attention_mask"].bool()
    torch.testing.assert_close(caught["out"][real], wanted[real], atol=1e-5, rtol=1e-5)


def test_llama_adapter__the_token_attention_still_sums_to_one() -> None:
    """With g = 1 the tokens keep their weights, whatever P is; a prefix would take some of them."""
    model = make("llama")
    (delta, *_) = gw.graft(model, gw.LlamaAdapter(3, squash="none")).deltas()
    shown: Any = delta
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 5, 8, generator=generator), torch.randn(1, 2, 5, 8, generator=generator)
    v = torch.ones(1, 2, 5, 8)

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: int) -> Tensor:
        assert extra == 0
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)

    attention = Attention(model, call, 8**-0.5, 2, 5)
    with torch.no_grad():
        shown.gate.fill_(1.0)
        for size in (0.1, 1.0, 30.0):
            shown.prompt.normal_(0, size, generator=generator)
            sites = shown._sites
            on_prompt = (q @ projected(shown.prompt, sites[0], 2).repeat_interleave(2, 1).mT * 8**-0.5).softmax(-1)
            of_prompt = on_prompt @ projected(shown.prompt, sites[1], 2).repeat_interleave(2, 1)
            tokens = shown.attend(q, k, v, None, attention) - of_prompt
            # values of one: what is left is the sum of the weights over the tokens
            torch.testing.assert_close(tokens, torch.ones_like(tokens), atol=1e-4, rtol=1e-4)
        prefix: Any = next(iter(gw.graft(make("llama"), gw.Prefix(3)).deltas()))
        prefix.values.zero_()

        def longer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: int) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        assert (prefix.attend(q, k, v, None, Attention(model, longer, 8**-0.5, 2, 5)) < 0.99).all()


@pytest.mark.parametrize(("gate", "total"), [("per_head", 1_229_760), ("scalar", 1_228_830)])
def test_llama_adapter__counts_of_llama_7b(gate: str, total: int) -> None:
    adapter = gw.graft(llama_7b(), gw.LlamaAdapter(10, top=30, gate=gate), head=False)
    assert adapter.num_parameters == total == sum(map(adapter.methods[0].count, adapter.sites))
    assert [site.layer for site in adapter.sites] == list(range(2, 32))


def test_llama_adapter__layers_below_have_no_graph() -> None:
    model, given = make("llama", num_hidden_layers=4), batch("llama")
    gw.graft(model, gw.LlamaAdapter(3, top=2))
    assert gw.LlamaAdapter(3, top=2).count(gw.anatomy(model).of("attn")[0]) == 0
    states = model(**given, output_hidden_states=True).hidden_states
    assert [h.grad_fn is not None for h in states] == [False, False, False, True, True]


@pytest.mark.parametrize("made", FORMS, ids=str)
def test_llama_adapter__generation_with_and_without_cache_agree(made: gw.LlamaAdapter) -> None:
    model, given = make("llama"), batch("llama")
    scatter(gw.graft(model, made), 1.0)
    torch.testing.assert_close(decode(model, given), decode(model, given, use_cache=False), atol=1e-4, rtol=1e-4)
