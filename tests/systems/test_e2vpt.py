"""E^2VPT (Han et al. 2023): the acceptance checks of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_models import bert, closed_form, spread, vit, vit_base
from torch import Tensor, nn
from vision_models import pictures, swin

import graftwork as gw

pytestmark = pytest.mark.system("e2vpt")

BATCHES = [{"pixel_values": pictures(4, seed=s), "labels": torch.tensor([0, 1, 1, 0])} for s in (1, 2)]


def grafted(text: str = "e2vpt(n_p=6, n_kv=3, dropout=0.0)", head: bool | None = None) -> tuple[Any, Any]:
    model = vit()
    adapter = gw.graft(model, text, "it", head=head, seed=0)
    return model, adapter


def train(model: nn.Module, adapter: Any, steps: int = 6, decay: float = 0.1) -> None:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=decay)
    for step in range(steps):
        model(**BATCHES[step % 2]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def masks_of(adapter: Any) -> Any:
    return adapter.parts[0].shared_modules["masks"]


def test_e2vpt__without_key_value_prompts_it_is_vpt() -> None:
    images, (model, adapter) = pictures(), grafted("e2vpt(n_p=6, n_kv=0, dropout=0.0)", head=False)
    twin = vit()
    deep = gw.graft(twin, gw.VPT(6, dropout=0.0), "it", head=False, seed=0)
    for one, two in zip(adapter.parameters(), deep.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(model(images).logits, twin(images).logits)


@pytest.mark.parametrize("make", [vit, swin])
def test_e2vpt__key_value_prompts_are_a_prefix_with_equal_keys_and_values(make: Any) -> None:
    images, model = pictures(size=8 if make is vit else 16), make()
    adapter = gw.graft(model, gw.KVPrompt(3), head=False)
    spread(adapter)
    out = model(images).logits
    twin = make()
    prefix = gw.graft(twin, gw.Prefix(3, "flat"), head=False)
    for tied, delta in zip(adapter.deltas(), prefix.deltas(), strict=True):
        delta.keys.data, delta.values.data = tied.prompt.data.clone(), tied.prompt.data.clone()
    torch.testing.assert_close(twin(images).logits, out)
    assert (make()(images).logits - out).abs().max() > 1e-4
    for delta in adapter.deltas():  # whatever their order
        delta.prompt.data = delta.prompt.data[[2, 0, 1]]
    torch.testing.assert_close(model(images).logits, out)


def test_e2vpt__the_softmax_is_over_all_keys_and_the_prompts() -> None:
    """One head of the first block, by hand."""
    images, model = pictures(), vit(1)
    adapter = gw.graft(model, gw.KVPrompt(3), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    seen: list[Tensor] = []
    model.vit.layers[0].attention.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(images)
    plain: Any = vit(1)
    x = plain.vit.layers[0].layernorm_before(plain.vit.embeddings(images))
    a = plain.vit.layers[0].attention
    q, k, v = (f(x)[..., 8:16] for f in (a.q_proj, a.k_proj, a.v_proj))  # the second of four heads
    r = delta.prompt[:, 8:16].expand(2, -1, -1)
    p = (q @ torch.cat([r, k], 1).mT * 8**-0.5).softmax(-1)
    assert p.shape == (2, 5, 5 + 3)
    torch.testing.assert_close(seen[0][..., 8:16], p @ torch.cat([r, v], 1))


def test_e2vpt__a_masked_token_stands_there_as_zeros_unless_it_is_dropped() -> None:
    images = pictures()
    outputs = {}
    for drop in (False, True):
        model, adapter = grafted(f"e2vpt(n_p=4, n_kv=0, dropout=0.0, drop={drop})", head=False)
        spread(adapter, 1.0)
        masks_of(adapter).tokens[[0, 2]] = 0
        outputs[drop] = model(images).logits
        lengths: list[int] = []
        model.vit.layers[0].layernorm_before.register_forward_pre_hook(
            lambda m, args, n=lengths: n.append(args[0].shape[1])
        )
        model(images)
        assert lengths == [5 + (2 if drop else 4)]
        few, deep = vit(), gw.VPT(2 if drop else 4, dropout=0.0)
        reference = gw.graft(few, deep, head=False)
        for mine, delta in zip(reference.parameters(), adapter.deltas(), strict=True):
            p = delta.tokens.prompt.data
            mine.data = p[[1, 3]] if drop else p * torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None]
        torch.testing.assert_close(few(images).logits, outputs[drop])
    assert (outputs[True] - outputs[False]).abs().max() > 1e-4


def test_e2vpt__importance_is_the_mean_gradient_of_the_masks() -> None:
    """By finite differences, in post-norm blocks, where the length of a token matters."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 32, dropout=0.0, batch_first=True), 2).eval()
    adapter = gw.graft(model, gw.PrunedVPT(6, dropout=0.0), "it")
    spread(adapter, 1.0)
    batches = [torch.randn(2, 5, 32), torch.randn(2, 5, 32)]
    target = torch.randn(2, 5, 32)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return (m(x) * target).sum()

    rewinding = gw.Rewinding(model, "it")
    rewinding.measure(batches, loss)
    ((tokens, pieces),) = rewinding.scores
    assert tokens.min() < -0.1 and tokens.max() > 0.1
    for scores, name, places in ((tokens, "tokens", [1, 4]), (pieces, "pieces", [(0, 3), (5, 15)])):
        mask = getattr(masks_of(adapter), name)
        for place in places:
            values = []
            for value in (1.02, 0.98):
                mask[place] = value
                values.append(sum(loss(model, x).item() for x in batches) / 2)
            mask[place] = 1
            assert scores[place].item() == pytest.approx((values[0] - values[1]) / 0.04, abs=5e-3)
    torch.testing.assert_close(tokens, pieces.sum(1), atol=1e-4, rtol=1e-4)  # a token is all of its pieces
    rewinding.measure(batches, loss, signed=False)
    assert (rewinding.scores[0][0] >= tokens.abs() - 1e-5).all() and (rewinding.scores[0][1] > 0).all()
    assert all(torch.equal(m, torch.ones_like(m)) and not m.requires_grad for m in masks_of(adapter).buffers())


def test_e2vpt__a_norm_behind_the_prompts_hides_what_a_whole_token_is_worth() -> None:
    """Layer norm gives the same for m P whatever m is: in pre-norm blocks only the pieces have scores beyond rounding."""
    model, adapter = grafted()
    spread(adapter, 1.0)
    rewinding = gw.Rewinding(model, "it")
    rewinding.measure(BATCHES)
    ((tokens, pieces),) = rewinding.scores
    assert tokens.abs().max() < 1e-4 * pieces.abs().max()


def test_e2vpt__rewinding_prunes_the_least_and_starts_again() -> None:
    model, adapter = grafted()
    start = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    rewinding = gw.Rewinding(model, "it")
    train(model, adapter)
    assert all(not torch.equal(p, start[name]) for name, p in adapter.named_parameters())
    rewinding.measure(BATCHES)
    ((tokens, pieces),) = rewinding.scores
    rewinding.rewind(0.5, 0.9)
    masks = masks_of(adapter)
    assert masks.tokens.tolist() == [float(t > tokens.sort().values[2]) for t in tokens]  # 3 of 6 are gone
    assert torch.equal(masks.pieces.sum(1), torch.full((6,), 4.0))  # 14 of 16 would be, 4 stay
    assert all(pieces[i][masks.pieces[i] == 1].min() >= pieces[i][masks.pieces[i] == 0].max() for i in range(6))
    kept = (masks.tokens[:, None] * masks.pieces).repeat_interleave(2, 1)
    prompts = [delta.tokens.prompt for delta in adapter.parts[0].deltas.values()]
    for name, p in adapter.named_parameters():  # the key-value prompts and the head too
        pruned = any(p is prompt for prompt in prompts)
        assert torch.equal(p, start[name] * kept if pruned else start[name])
    for _ in range(3):
        train(model, adapter, 1)
        for prompt in prompts:
            assert not prompt[kept == 0].any() and prompt[kept == 1].all()
    assert any(not torch.equal(p, start[name]) for name, p in adapter.named_parameters())
    rewinding.rewind(0.99, 0.0)  # another share begins anew; one token is left
    assert masks.tokens.sum() == 1 and masks.pieces.all()
    rewinding.rewind(0.0)
    assert all(torch.equal(p, start[name]) for name, p in adapter.named_parameters())


def test_e2vpt__counts_before_and_after_pruning_and_on_disk(tmp_path: Any) -> None:
    model, adapter = grafted(head=False)
    whole = 2 * 6 * 32 + 2 * 3 * 32
    assert adapter.num_parameters == closed_form(model, adapter.methods) == whole
    rewinding = gw.Rewinding(model, "it")
    rewinding.measure(BATCHES)
    rewinding.rewind(0.5, 0.25)
    surviving = 2 * (3 * 12 * 2) + 2 * 3 * 32  # of each block: 3 tokens, 12 of 16 pieces each, 2 numbers in a piece
    assert adapter.num_parameters == surviving
    spread(adapter)
    out = model(pictures()).logits
    gw.save(model, "it", tmp_path)
    twin = vit()
    assert gw.load(twin, tmp_path).num_parameters == surviving
    assert torch.equal(twin(pictures()).logits, out)

    base = vit_base()
    large = gw.graft(base, "e2vpt(n_p=20, n_kv=10)", head=False)
    assert large.num_parameters == closed_form(base, large.methods) == 12 * 20 * 768 + 12 * 10 * 768
    backbone = sum(p.numel() for name, p in base.named_parameters() if "graft" not in name)
    # 0.32% of ViT-B is about 30 prompts a block, kept ones of both kinds together
    assert large.num_parameters / backbone == pytest.approx(0.0032, rel=0.01)


def test_e2vpt__windows_are_pruned_alike() -> None:
    model = swin()
    adapter = gw.graft(model, gw.PrunedVPT(4, segments=4, dropout=0.0), "it", head=False)
    spread(adapter, 1.0)
    rewinding = gw.Rewinding(model, "it")
    given = {"pixel_values": pictures(size=16), "labels": torch.tensor([0, 1])}
    rewinding.measure([given])
    rewinding.rewind(0.5, 0.0)
    assert adapter.num_parameters == 2 * 2 * (8 + 16)
    twin = swin()
    deep = gw.graft(twin, gw.VPT(4, dropout=0.0), head=False)
    for mine, delta in zip(deep.parameters(), adapter.deltas(), strict=True):
        mine.data = delta.tokens.prompt.data.clone()
    torch.testing.assert_close(model(**given).logits, twin(**given).logits)


def test_e2vpt__bad_input_is_refused_by_name() -> None:
    model = vit()
    with pytest.raises(gw.GraftError, match="32 numbers"):
        gw.graft(model, "e2vpt(segments=5)")
    with pytest.raises(gw.GraftError, match="text"):
        gw.graft(bert(), "e2vpt")
    gw.graft(model, gw.VPT(2), "plain")
    with pytest.raises(gw.GraftError, match="pruned_vpt"):
        gw.Rewinding(model, "plain")
    gw.graft(model, "e2vpt", "it")
    rewinding = gw.Rewinding(model, "it")
    with pytest.raises(gw.GraftError, match="measure"):
        rewinding.rewind(0.5)
    with pytest.raises(gw.GraftError, match="no batch"):
        rewinding.measure([])
    rewinding.measure(BATCHES)
    with pytest.raises(gw.GraftError, match="share"):
        rewinding.rewind(1.0)
