"""VPT (Jia et al. 2022): the acceptance checks of the catalogue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from adapter_models import bert, closed_form, on_meta, spread, vit, vit_base
from torch import Tensor, nn
from transformers.models.swin.modeling_swin import window_partition, window_reverse
from vision_models import pictures, swin

import graftwork as gw

pytestmark = pytest.mark.system("vpt")


def prompted(model: Any, images: Tensor, prompts: list[Tensor] | Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of a ViT, and what enters each block: a list of prompts is set afresh in front of each, one goes along."""
    z, seen = model.vit.embeddings(images), []
    p = (prompts[0] if isinstance(prompts, list) else prompts).shape[0]
    for i, block in enumerate(model.vit.layers):
        if isinstance(prompts, list) or i == 0:
            given = prompts[i] if isinstance(prompts, list) else prompts
            rest = z[:, 1:] if i == 0 else z[:, 1 + p :]
            z = torch.cat([z[:, :1], given.expand(z.shape[0], -1, -1), rest], 1)
        seen.append(z)
        z = block(z)
    return model.classifier(model.vit.layernorm(z)[:, 0]), seen


def grafted(images: Tensor, **options: Any) -> tuple[Any, Any, Tensor]:
    """A ViT with prompts of large random values, and its logits."""
    model = vit(3)
    adapter = gw.graft(model, gw.VPT(4, dropout=0.0, **options), head=False)
    spread(adapter, 1.0)
    return model, adapter, model(images).logits


def prompts_of(adapter: Any) -> list[Tensor]:
    return [delta.tokens.prompt for delta in adapter.deltas() if delta.tokens is not None]


@pytest.mark.parametrize("deep", [True, False])
def test_vpt__every_block_sees_the_class_token_the_prompts_and_the_patches(deep: bool) -> None:
    images = pictures()
    model, adapter, logits = grafted(images, deep=deep)
    given = prompts_of(adapter)
    want, seen = prompted(vit(3), images, given if deep else given[0])
    torch.testing.assert_close(logits, want)
    entered: list[Tensor] = []
    for block in model.vit.layers:
        block.layernorm_before.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    model(images)
    assert [list(z.shape) for z in entered] == [[2, 1 + 4 + 4, 32]] * 3
    for z, w in zip(entered, seen, strict=True):  # in this order: the class token, P, the patches
        torch.testing.assert_close(z, w)
    assert model.vit(images).last_hidden_state.shape == (2, 1 + 4, 32)


def test_vpt__deep_prompts_that_are_the_shallow_ones_states_give_the_shallow_outputs() -> None:
    images = pictures(1)
    _, adapter, logits = grafted(images, deep=False)
    _, seen = prompted(vit(3), images, prompts_of(adapter)[0])
    model, deep, other = grafted(images, deep=True)
    with torch.no_grad():
        for prompt, z in zip(prompts_of(deep), seen, strict=True):
            prompt.copy_(z[0, 1:5])
    assert (other - logits).abs().max() > 1e-3
    torch.testing.assert_close(model(images).logits, logits)


def test_vpt__a_prompt_gets_its_gradient_through_its_block_and_later_ones() -> None:
    images = pictures()
    model, adapter, _ = grafted(images)
    outputs: list[Tensor] = []
    for block in model.vit.layers:
        block.register_forward_hook(lambda m, args, out: outputs.append(out))
    model(images)
    for j, out in enumerate(outputs):
        gradients = torch.autograd.grad(
            out[:, 0].pow(2).sum(), prompts_of(adapter), retain_graph=True, allow_unused=True
        )
        assert [g is not None and bool(g.any()) for g in gradients] == [i <= j for i in range(3)]


def test_vpt__counts_init_and_no_prompts_at_all() -> None:
    base = vit_base()
    deep = gw.VPT(50)
    assert closed_form(base, [deep]) == gw.graft(base, deep, "deep", head=False).num_parameters == 460_800
    shallow, narrow = gw.VPT(50, deep=False), gw.VPT(10, project=64)
    assert gw.graft(base, shallow, "shallow", head=False).num_parameters == closed_form(base, [shallow]) == 50 * 768
    size = 12 * 10 * 64 + 64 * 768 + 768
    assert gw.graft(base, narrow, "narrow", head=False).num_parameters == closed_form(base, [narrow]) == size
    shared = gw.VPT(10, shared=True)
    assert gw.graft(base, shared, "shared", head=False).num_parameters == closed_form(base, [shared]) == 10 * 768

    config = T.ViTConfig(num_hidden_layers=1)  # 16 x 16 patches, d = 768
    real = T.ViTForImageClassification(config)
    (prompt,) = prompts_of(gw.graft(real, gw.VPT(200), head=False))
    v = math.sqrt(6 / (3 * 16 * 16 + 768))
    assert v == 0.0625 and prompt.abs().max() <= v and prompt.abs().max() > 0.999 * v
    torch.testing.assert_close(prompt.std(), torch.tensor(v / math.sqrt(3)), rtol=0.02, atol=0)

    images, model = pictures(), vit()
    want = model(images).logits
    for deep_too in (True, False):
        gw.graft(model, gw.VPT(0, deep=deep_too), f"none {deep_too}", head=False)
        assert torch.equal(model(images).logits, want)


def test_vpt__one_projection_and_one_table_for_all_blocks() -> None:
    images = pictures()
    _, adapter, logits = grafted(images, project=6)
    ((down,),) = [list(part.shared_modules.values()) for part in adapter.parts]
    assert down.weight.shape == (32, 6) and [tuple(p.shape) for p in prompts_of(adapter)] == [(4, 6)] * 3
    want, _ = prompted(vit(3), images, [F.linear(p, down.weight, down.bias) for p in prompts_of(adapter)])
    torch.testing.assert_close(logits, want)
    _, adapter, logits = grafted(images, shared=True)
    (table,) = adapter.parameters()
    torch.testing.assert_close(logits, prompted(vit(3), images, [table] * 3)[0])


def test_vpt__dropout_is_that_of_the_prompts_and_each_images_own() -> None:
    model = vit()
    gw.graft(model, gw.VPT(4, dropout=0.5), head=False)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    out = model.train()(pictures(1).expand(4, -1, -1, -1)).logits
    assert len({tuple(row.tolist()) for row in out}) > 1
    out = model.eval()(pictures(1).expand(4, -1, -1, -1)).logits
    torch.testing.assert_close(out, out[:1].expand_as(out))


def swin_block(block: Any, x: Tensor, size: tuple[int, int], p: Tensor) -> Tensor:
    """A Swin block with prompts in every window, as the authors' code has it: their own attention is thrown away."""
    (h, w), n, ws, d = size, p.shape[0], block.window_size, x.shape[-1]
    states, prompts = block.layernorm_before(x), block.layernorm_before(p)
    windows = window_partition(block.cyclic_shift(states.view(-1, h, w, d)), ws).view(-1, ws * ws, d)
    longer = torch.cat([prompts.expand(windows.shape[0], -1, -1), windows], 1)
    a = block.attention
    q, k, v = (
        f(longer).unflatten(-1, (a.num_attention_heads, -1)).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj)
    )
    mask = block.get_attn_mask(h, w, x.dtype, x.device)
    bias = a.relative_position_bias()
    if mask is not None:
        bias = (bias + mask[:, None]).repeat(x.shape[0], 1, 1, 1)
    scores = q @ k.mT * a.head_dim**-0.5 + F.pad(bias, (n, 0, n, 0))
    out = a.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))[:, n:]
    out = block.cyclic_shift(window_reverse(out.view(-1, ws, ws, d), ws, h, w), reverse=True)
    x = x + out.reshape(x.shape)
    return x + block.mlp(block.layernorm_after(x))


def test_vpt__swin_has_the_prompts_in_every_window() -> None:
    images, model = pictures(size=16), swin()
    plain: Any = swin()
    adapter = gw.graft(model, gw.VPT(3, dropout=0.0), head=False)
    spread(adapter, 1.0)
    given = iter(prompts_of(adapter))
    z, size = plain.swin.embeddings(images)[:2]
    for stage in plain.swin.encoder.layers:
        for block in stage.blocks:
            z = swin_block(block, z, size, next(given))
        if stage.downsample is not None:
            z, size = stage.downsample(z, size), (size[0] // 2, size[1] // 2)
    want = plain.classifier(plain.swin.layernorm(z).mean(1))
    assert (want - plain(images).logits).abs().max() > 1e-2
    torch.testing.assert_close(model(images).logits, want)
    assert adapter.num_parameters == 3 * (2 * 8 + 2 * 16) == closed_form(plain, [gw.VPT(3)])


def test_vpt__runs_on_other_vision_towers() -> None:
    clip = T.CLIPModel(
        T.CLIPConfig(
            text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            vision_config={
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 8, "patch_size": 4,
            },
            projection_dim=8,
        )
    ).eval()  # fmt: skip
    want = clip.get_image_features(pixel_values=pictures()).pooler_output
    adapter = gw.graft(clip, gw.VPT(4, at="vision.block"))
    assert adapter.num_parameters == 2 * 4 * 16
    assert (clip.get_image_features(pixel_values=pictures()).pooler_output - want).abs().max() > 1e-5


def refused(model: nn.Module, method: str, found: str) -> None:
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(gw.GraftError, match=found):
        gw.graft(model, method)
    assert {name: type(m) for name, m in model.named_modules()} == before


def test_vpt__bad_input_is_refused_by_name() -> None:
    refused(bert(), "vpt", "text")
    refused(vit(), "vpt(at='attn')", "role 'attn'")
    refused(swin(), "vpt(deep=False)", "windows")
    refused(swin(), "vpt(shared=True)", r"widths \[8, 16\]")
    refused(swin(), "vpt(project=4)", r"widths \[8, 16\]")
    refused(on_meta(lambda: T.ConvNextForImageClassification(T.ConvNextConfig())), "vpt", "0 attentions")
    with pytest.raises(gw.GraftError, match="num_tokens"):
        gw.VPT(-1)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 1).eval()
    gw.graft(encoder, gw.VPT(2))
    with pytest.raises(gw.GraftError, match="mask"):
        encoder(torch.randn(2, 3, 16), src_key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
