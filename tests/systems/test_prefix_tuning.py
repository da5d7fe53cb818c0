"""Prefix-Tuning (Li and Liang 2021): the acceptance checks of the catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from attention_models import batch, decode, make, run, scatter
from safetensors.torch import load_file
from torch import Tensor

import graftwork as gw
from graftwork.core.attention import Attention
from graftwork.core.masks import causal_mask, extend
from graftwork.initialise.words import from_words

pytestmark = pytest.mark.system("prefix-tuning")


def gpt2_medium() -> Any:
    with torch.device("meta"):
        return T.GPT2LMHeadModel(T.GPT2Config(n_embd=1024, n_layer=24, n_head=16))


@pytest.mark.parametrize("causal", [False, True])
def test_prefix_tuning__attention_is_the_gated_sum(causal: bool) -> None:
    """Attn(q, K', V') = (1 - lam) Attn(q, K, V) + lam Attn(q, P_K, P_V), to 1e-5, by the paper's sums of
    exponentials."""
    adapter = gw.graft(make("gpt2"), gw.Prefix(4))
    scatter(adapter, 1.0)
    delta: Any = next(iter(adapter.deltas()))
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = causal_mask(6, 6, q.device) if causal else None

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, extend(mask, extra, 6))

    with torch.no_grad():
        out = delta.attend(q, k, v, mask, Attention(delta, call, 8**-0.5, 1, 6))
        p_k, p_v = delta.in_front(delta.keys, k), delta.in_front(delta.values, v)
        on_prefix = (q @ p_k.mT * 8**-0.5).exp().sum(-1, keepdim=True)
        on_tokens = (q @ k.mT * 8**-0.5).exp()
        on_tokens = (on_tokens if mask is None else on_tokens * mask).sum(-1, keepdim=True)
        lam = on_prefix / (on_prefix + on_tokens)
        own, extra = F.scaled_dot_product_attention(q, k, v, mask), F.scaled_dot_product_attention(q, p_k, p_v)
    assert lam.min() > 0.05 and lam.max() < 0.999
    torch.testing.assert_close(out, (1 - lam) * own + lam * extra, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_prefix_tuning__the_exported_prefix_gives_the_logits_of_the_trained_mlp(kind: str, tmp_path: Path) -> None:
    model, given = make(kind), batch(kind)
    adapter = gw.graft(model, gw.Prefix(3, "mlp", mid=8), "task")
    scatter(adapter)
    wanted = run(model, given)
    gw.save(model, "task", tmp_path / "folded")
    stored = load_file(tmp_path / "folded" / "adapter.safetensors")
    attentions = {"gpt2": 2, "llama": 2, "t5": 6, "bart": 6}[kind]
    assert sum(t.numel() for t in stored.values()) == attentions * 2 * 3 * (16 if kind == "llama" else 32)
    fresh = make(kind)
    gw.load(fresh, tmp_path / "folded")
    torch.testing.assert_close(run(fresh, given), wanted, atol=1e-6, rtol=1e-6)
    assert [m.reparam for m in gw.adapters(fresh)["task"].methods] == ["flat"]


def test_prefix_tuning__resume_keeps_the_trained_form(tmp_path: Path) -> None:
    model, given = make("gpt2"), batch("gpt2")
    adapter = gw.graft(model, gw.Prefix(3, "mlp", mid=8), "task")
    scatter(adapter)
    gw.save(model, "task", tmp_path, resume=True)
    fresh = make("gpt2")
    again = gw.load(fresh, tmp_path, trainable=True)
    assert str(again.methods[0]) == str(adapter.methods[0])
    assert again.num_parameters == adapter.num_parameters
    assert torch.equal(run(fresh, given), run(model, given))
    for m in (model, fresh):
        run(m, given, grad=True).pow(2).mean().backward()
    for a, b in zip(adapter.parameters(), again.parameters(), strict=True):
        assert a.grad is not None and a.grad.abs().max() > 0
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_prefix_tuning__hidden_rows_are_the_backbone(kind: str, how: str) -> None:
    model, given = make(kind), batch(kind, rows=3)
    model.set_attn_implementation(how)
    plain = run(model, given)
    scatter(gw.graft(model, gw.Prefix(3), head=False), 1.0)
    everywhere = run(model, given)
    with gw.context(model, prefix_rows=torch.tensor([False, True, False])):
        out = run(model, given)
    assert torch.equal(out[0], plain[0]) and torch.equal(out[2], plain[2])
    torch.testing.assert_close(out[1], everywhere[1])
    assert (out[1] - plain[1]).abs().max() > 1e-2
    assert all((everywhere[i] - plain[i]).abs().max() > 1e-2 for i in (0, 2))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_prefix_tuning__incremental_decoding_equals_the_full_forward(kind: str, how: str) -> None:
    model, given = make(kind), batch(kind, length=8, pad=0)
    model.set_attn_implementation(how)
    scatter(gw.graft(model, gw.Prefix(3)), 1.0)
    ids = given["input_ids"]
    with torch.no_grad():
        full = model(ids).logits
        state, steps = None, []
        for i in range(ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=state, use_cache=True)
            state = out.past_key_values
            steps.append(out.logits[:, 0])
            assert state.get_seq_length() == i + 1  # the prefix is never in the cache
    torch.testing.assert_close(torch.stack(steps, 1), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_prefix_tuning__generation_with_and_without_cache_agree(kind: str) -> None:
    model, given = make(kind), batch(kind)
    scatter(gw.graft(model, gw.Prefix(3)), 1.0)
    torch.testing.assert_close(decode(model, given), decode(model, given, use_cache=False), atol=1e-4, rtol=1e-4)


def test_prefix_tuning__counts_of_gpt2_medium() -> None:
    model = gpt2_medium()
    flat = gw.graft(model, gw.Prefix(10), "flat", head=False)
    assert flat.num_parameters == 491_520 == sum(map(flat.methods[0].count, flat.sites))
    trained = gw.graft(model, "prefix_tuning(length=10, mid=512)", "mlp", head=False)
    method = trained.methods[0]
    formula = 10 * 1024 + (1024 * 512 + 512) + (512 * 2 * 24 * 1024 + 2 * 24 * 1024)
    assert trained.num_parameters == formula == 25_750_016
    assert sum(map(method.count, trained.sites)) + method.count_shared(trained.sites) == formula


def test_prefix_tuning__encoder_decoder_has_three_independent_tables() -> None:
    model, given = make("t5"), batch("t5")
    adapter = gw.graft(model, gw.Prefix(3, "mlp", mid=8))
    shared = adapter.parts[0].shared_modules
    assert len(shared) == 3
    method = adapter.methods[0]
    assert adapter.num_parameters == sum(map(method.count, adapter.sites)) + method.count_shared(adapter.sites)
    assert method.count_shared(adapter.sites) == 3 * (3 * 32 + 32 * 8 + 8)
    run(model, given, grad=True).sum().backward()
    for module in shared.values():
        assert module.table.grad.abs().max() > 0


def test_prefix_tuning__dropout_is_in_training_only_and_differs_between_rows() -> None:
    model = make("gpt2")
    scatter(gw.graft(model, gw.Prefix(3, dropout=0.5)))
    row = batch("gpt2", rows=1, pad=0)["input_ids"]
    ids = row.expand(3, -1)
    once = run(model, {"input_ids": ids})
    assert torch.equal(once, run(model, {"input_ids": ids}))
    torch.testing.assert_close(once[1:], once[:1].expand(2, -1, -1))
    model.train()
    dropped = run(model, {"input_ids": ids})
    assert not torch.allclose(dropped[0], dropped[1]) and not torch.allclose(dropped[1], dropped[2])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prefix_tuning__a_prefix_of_real_words_behind_them_is_the_words(kind: str, use_cache: bool) -> None:
    """With positions that go on behind it, a prefix that starts from words is those words: absolute and rotary
    positions."""
    model = make(kind)
    words, ids = batch(kind, rows=1, length=3, pad=0, seed=8)["input_ids"], batch(kind, rows=1, pad=0)["input_ids"]
    adapter = gw.graft(model, gw.Prefix(3, at="attn, entry"))
    assert adapter.num_parameters == sum(map(adapter.methods[0].count, adapter.sites))
    before = run(model, {"input_ids": ids})
    from_words(model, "default", input_ids=words)
    out, steps = run(model, {"input_ids": ids}), decode(model, {"input_ids": ids}, use_cache=use_cache)
    longer = {"input_ids": torch.cat([words, ids], 1)}
    with gw.using(model, None):
        torch.testing.assert_close(out, run(model, longer)[:, 3:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(steps, decode(model, longer, use_cache=use_cache), atol=1e-4, rtol=1e-4)
    assert (out - before).abs().max() > 1e-2
    with pytest.raises(gw.GraftError, match="give `length` tokens"):
        from_words(model, "default", input_ids=ids)


def test_prefix_tuning__shifted_positions_are_kept_in_the_file(tmp_path: Path) -> None:
    model, given = make("gpt2"), batch("gpt2")
    scatter(gw.graft(model, "prefix_tuning(length=3, mid=8, shift_positions=True)", "task"))
    wanted = run(model, given)
    gw.save(model, "task", tmp_path)
    fresh = make("gpt2")
    gw.load(fresh, tmp_path)
    torch.testing.assert_close(run(fresh, given), wanted, atol=1e-6, rtol=1e-6)
    plain = make("gpt2")
    unshifted = gw.graft(plain, gw.Prefix(3, "mlp", mid=8))
    with torch.no_grad():
        for mine, theirs in zip(unshifted.parameters(), gw.adapters(model)["task"].parameters(), strict=True):
            mine.copy_(theirs)
    assert (run(plain, given) - wanted).abs().max() > 1e-2
    with pytest.raises(gw.GraftError, match="numbers its tokens itself"):
        gw.graft(make("roberta"), gw.Prefix(3, at="attn, entry"))
