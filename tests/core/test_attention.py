"""The inside of attention: what a delta's `attend` sees, and that longer keys are right in every kind of attention."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_models import batch, decode, make, run, scatter
from torch import Tensor, nn

import graftwork as gw
from graftwork.core.attention import Attention
from graftwork.core.delta import Delta
from graftwork.core.fields import where
from graftwork.core.masks import Tokens, causal_mask, extend
from graftwork.core.method import REGISTRY, Method, method
from graftwork.core.site import Site
from graftwork.sites import anatomy as core_anatomy
from graftwork.sites.heads import widths

KINDS = ["bert", "llama", "gpt2", "t5", "vit", "bart", "whisper", "torch"]
IMPLEMENTATIONS = ["sdpa", "eager"]
CASES = [(kind, how) for kind in KINDS for how in IMPLEMENTATIONS if (kind, how) != ("torch", "eager")]


@dataclass(frozen=True)
class Spy(Method):
    """Calls the base attention, and notes what it was given and what came out."""

    at: str = where("attn")

    def build(self, site: Site, part: Any) -> Noted:
        return Noted()

    def count(self, site: Site) -> int:
        return 1


class Noted(Delta):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[Tensor, Tensor, Tensor, Any, Attention, Tensor]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        out = attention(q, k, v, mask)
        self.seen.append((q, k, v, mask, attention, out))
        return out


@pytest.fixture(autouse=True)
def spy() -> Any:
    method("spy_on_attention")(Spy)
    method("attend_apart")(Apart)
    yield
    del REGISTRY["spy_on_attention"], REGISTRY["attend_apart"]


def using(kind: str, how: str, **changes: Any) -> Any:
    model = make(kind, **changes)
    if kind != "torch":
        model.set_attn_implementation(how)
    return model


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_the_base_attention_is_the_backbone(kind: str, how: str) -> None:
    model, given = using(kind, how), batch(kind)
    before = run(model, given)
    adapter = gw.graft(model, Spy(), head=False)
    model.eval()
    after = run(model, given)
    # the eval fast path of nn.TransformerEncoder is a fused kernel, which rounds otherwise and leaves padding at zero
    if kind == "torch":
        real = ~given["src_key_padding_mask"]
        torch.testing.assert_close(after[real], before[real])
    else:
        assert torch.equal(after, before)
    assert all(len(delta.seen) == 1 for delta in adapter.deltas())
    for delta in adapter.deltas():
        q, k, v, _, attention, out = delta.seen[0]
        assert q.dim() == 4 and q.shape[1] == 4 and q.shape[0] == 2
        assert k.shape[:3] == v.shape[:3] and k.shape[2] == attention.keys
        assert attention.groups == q.shape[1] // k.shape[1] == (2 if kind == "llama" else 1)
        assert out.shape == (*q.shape[:3], v.shape[-1])


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_extra_keys_are_one_softmax_over_both(kind: str, how: str) -> None:
    """Attn(q, K', V') = (1 - lam) Attn(q, K, V) + lam Attn(q, P_K, P_V), with lam from the log-sum-exp of the two
    sets of scores."""
    model, given = using(kind, how), batch(kind)
    adapter = gw.graft(model, [gw.Prefix(3), Spy()], head=False)
    scatter(adapter, 1.0)
    prefixes, spies = (list(part.deltas.values()) for part in adapter.parts)
    with torch.no_grad():
        run(model, given)
        for prefix, spied in zip(prefixes, spies, strict=True):
            q, k, v, mask, attention, out = spied.seen[0]  # the spy stands around the prefix
            p_k, p_v = prefix.in_front(prefix.keys, k), prefix.in_front(prefix.values, v)
            p_k, p_v, k, v = (t.repeat_interleave(attention.groups, 1) for t in (p_k, p_v, k, v))
            extra = q @ p_k.mT * attention.scaling
            scores = q @ k.mT * attention.scaling + position_bias(kind, spied, model, spies, attention)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            elif is_causal(kind, spied):
                scores = scores.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -torch.inf)
            lam = torch.sigmoid(extra.logsumexp(-1, True) - scores.logsumexp(-1, True))
            own = scores.softmax(-1).nan_to_num() @ v  # nan: padding that sees no token
            wanted = (1 - lam) * own + lam * extra.softmax(-1) @ p_v
            torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Apart(Method):
    """Attends for some of the queries, and with the keys in another order."""

    at: str = where("attn")

    def build(self, site: Site, part: Any) -> Turned:
        return Turned()

    def count(self, site: Site) -> int:
        return 0


class Turned(Delta):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        batch, n, own, extra = q.shape[0], q.shape[2], attention.keys, k.shape[2] - attention.keys
        queries = torch.stack([torch.randperm(n)[: n // 2] for _ in range(batch)])
        keys = torch.stack([torch.randperm(own) for _ in range(batch)])
        self.full = attention(q, k, v, mask)
        self.taken = at(self.full, queries)
        self.some = attention.on(Tokens(queries))(at(q, queries), k, v, mask)
        k, v = (torch.cat([t[:, :, :extra], at(t[:, :, extra:], keys)], 2) for t in (k, v))
        self.turned = attention.on(Tokens(queries, keys))(at(q, queries), k, v, mask)
        return self.full


def at(t: Tensor, places: Tensor) -> Tensor:
    return t.gather(2, places[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_attention_among_some_tokens(kind: str, how: str) -> None:
    """Some queries attend as they do among all; the order of the keys, with those in front left there, changes nothing."""
    model, given = using(kind, how), batch(kind)
    adapter = gw.graft(model, [gw.Prefix(3), Apart()], head=False)
    scatter(adapter, 1.0)
    torch.manual_seed(0)
    with torch.no_grad():
        run(model, given)
    for delta in adapter.parts[1].deltas.values():
        assert isinstance(delta, Turned) and delta.some.shape[2] < delta.full.shape[2]
        for found in (delta.some, delta.turned):
            torch.testing.assert_close(found.nan_to_num(), delta.taken.nan_to_num(), atol=1e-5, rtol=1e-5)


def is_causal(kind: str, delta: Noted) -> bool:
    own = "self_attn" in delta.key or "SelfAttention" in delta.key
    return kind in ("llama", "gpt2") or ("decoder" in delta.key and own)


def position_bias(kind: str, delta: Noted, model: Any, spies: Any, attention: Attention) -> Tensor | float:
    """T5's relative positions, from the table of the stack's first block, for attentions over tokens."""
    if kind != "t5" or "EncDec" in delta.key:
        return 0.0
    stack = model.encoder if delta.key.startswith("encoder") else model.decoder
    table = stack.block[0].layer[0].SelfAttention
    return table.compute_bias(delta.seen[0][0].shape[2], attention.keys)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "falcon"])
@pytest.mark.parametrize("made", [gw.Prefix(3), gw.LlamaAdapter(3)], ids=["prefix", "llama_adapter"])
def test_generation_with_and_without_cache_agree(kind: str, made: Method) -> None:
    if kind == "falcon" and made.name == "llama_adapter":
        with pytest.raises(gw.GraftError, match="cannot be told apart"):
            gw.graft(make(kind), made)
        return
    # torch folds a product with a frozen weight otherwise than one with a trainable weight: other bits, no adapter
    model, given = make(kind).requires_grad_(False), batch(kind)
    plain = decode(model, given)
    adapter = gw.graft(model, made)
    scatter(adapter, 2.0)
    cached = decode(model, given, use_cache=True)
    torch.testing.assert_close(cached, decode(model, given, use_cache=False), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cached, plain, atol=1e-2)
    gw.activate(model, None)
    assert torch.equal(decode(model, given), plain)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5", "vit", "bart", "torch"])
def test_compiles_without_a_break(kind: str) -> None:
    model, given = make(kind), batch(kind)
    scatter(gw.graft(model, [gw.Prefix(3), gw.LlamaAdapter(2)], head=False))
    model.eval()
    with torch.no_grad():
        wanted = run(model, given)
        torch._dynamo.reset()
        torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="eager"), given), wanted)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5", "vit", "bart"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    model, given = make(kind), batch(kind)
    adapter = gw.graft(model, [gw.Prefix(3, "mlp", mid=8), gw.LlamaAdapter(2)], head=False)
    scatter(adapter)
    model.train()

    def gradients() -> list[Tensor]:
        run(model, given, grad=True).float().pow(3).mean().backward()
        found = [p.grad.clone() for p in adapter.parameters()]  # type: ignore[union-attr]
        model.zero_grad()
        return found

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, gradients(), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "torch"])
def test_a_copy_is_its_own(kind: str) -> None:
    model, given = make(kind), batch(kind)
    scatter(gw.graft(model, [gw.Prefix(3, "mlp", mid=8), gw.LlamaAdapter(2)], head=False))
    model.eval()
    wanted = run(model, given)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, given), wanted)
    scatter(gw.adapters(twin)["default"], seed=9)
    assert not torch.allclose(run(twin, given), wanted)
    assert torch.equal(run(model, given), wanted)


def test_torch_encoder_in_training_and_evaluation_agree() -> None:
    """In eval mode the encoder would compute a block in one fused kernel, around the attention call."""
    model, given = make("torch"), batch("torch")
    plain = run(model, given)
    scatter(gw.graft(model, gw.Prefix(3)))
    model.train()
    trained = run(model, given, grad=True)
    model.eval()
    with torch.no_grad():
        after = run(model, given)
    real = ~given["src_key_padding_mask"]
    torch.testing.assert_close(after[real], trained[real])
    assert not torch.allclose(after[real], plain[real], atol=1e-2)
    gw.activate(model, None)
    assert torch.equal(run(model, given), plain)


@pytest.mark.parametrize("causal", [False, True])
def test_multihead_attention_by_itself(causal: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    attention = model[1]
    adapter = gw.graft(model, gw.Prefix(2), head=False)
    scatter(adapter)
    x = torch.randn(3, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    out, _ = attention(x, x, x, need_weights=False, attn_mask=mask, is_causal=causal)
    delta = next(iter(adapter.deltas()))
    with gw.using(model, None):
        q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (t.view(3, 5, 2, 4).transpose(1, 2) for t in (q, k, v))
    k = torch.cat([delta.in_front(delta.keys, k), k], 2)
    v = torch.cat([delta.in_front(delta.values, v), v], 2)
    seen = extend(causal_mask(5, 5, x.device), 2, 5) if causal else None
    wanted = attention.out_proj(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).reshape(3, 5, 8))
    torch.testing.assert_close(out, wanted)
    with pytest.raises(gw.GraftError, match="need_weights=False"):
        attention(x, x, x, need_weights=True)


def test_an_attention_without_a_known_call_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            scores = self.q_proj(x) @ self.k_proj(x).mT
            return self.o_proj(scores.softmax(-1) @ self.v_proj(x))

    model = nn.Sequential(Own(), nn.Linear(8, 8))
    gw.graft(model, gw.Prefix(2, at="attn"), head=False)
    with pytest.raises(gw.GraftError, match="neither transformers' attention interface nor"):
        model(torch.randn(2, 3, 8))


def test_widths_of_keys_and_values() -> None:
    def of(kind: str, **changes: Any) -> set[tuple[int, int]]:
        return {widths(site) for site in core_anatomy.anatomy(make(kind, **changes)).of("attn")}

    assert of("llama") == {(16, 16)}  # two key heads of 8
    assert of("gpt2") == of("bert") == of("torch") == {(32, 32)}
    assert of("t5", d_kv=6) == {(24, 24)}
    assert of("falcon", multi_query=True, new_decoder_architecture=False) == {(8, 8)}


def test_two_prefixes_stand_beside_each_other() -> None:
    """Two active adapters with prefixes are one adapter whose prefix holds the rows of both."""
    model, given = make("llama"), batch("llama")
    scatter(gw.graft(model, gw.Prefix(2), "a"), seed=1)
    scatter(gw.graft(model, gw.Prefix(3), "b"), seed=2)
    both = gw.graft(model, gw.Prefix(5), "both")
    for part, a, b in zip(
        both.deltas(), gw.adapters(model)["a"].deltas(), gw.adapters(model)["b"].deltas(), strict=True
    ):
        for name in ("keys", "values"):
            getattr(part, name).data = torch.cat([getattr(a, name).data, getattr(b, name).data])
    wanted = run(model, given)
    gw.activate(model, "a >> b")
    torch.testing.assert_close(run(model, given), wanted)


def test_half_precision_backbone_with_a_float_prefix() -> None:
    model, given = make("llama").bfloat16(), batch("llama")
    adapter = gw.graft(model, gw.Prefix(2))
    for delta in adapter.deltas():
        delta.float()
    assert run(model, given).dtype == torch.bfloat16
