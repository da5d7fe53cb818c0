"""AdaLink (Wang et al. 2023): the acceptance checks of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from adapter_models import bert, closed_form, gpt2, ids, llama, on_meta, perturbed, spread, t5
from torch import Tensor, nn

import graftwork as gw

pytestmark = pytest.mark.system("adalink")

BOTH = "embedded, /multi_modal_projector.linear_2$/"  # text, images
IMAGE_TOKEN = 59


def llava() -> Any:
    """A language model that is given images through a vision tower and a projector."""
    torch.manual_seed(0)
    vision = T.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = T.LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=4)
    return perturbed(T.LlavaForConditionalGeneration(config)).eval()


def with_image() -> dict[str, Tensor]:
    tokens = torch.cat([ids(2, 2), torch.full((2, 4), IMAGE_TOKEN), ids(2, 3, seed=5).clamp(max=58)], 1)
    return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))}


def test_adalink__a_zero_up_projection_is_the_backbone_and_images_leave_texts_alone() -> None:
    model, given, text = llava(), with_image(), {"input_ids": ids().clamp(max=58)}
    want, plain = model(**given).logits, model(**text).logits
    adapter = gw.graft(model, gw.AdaLink(4, at=BOTH))
    assert torch.equal(model(**given).logits, want) and torch.equal(model(**text).logits, plain)
    of_text, of_image = adapter.deltas()
    assert "projector" in of_image.key
    with torch.no_grad():
        for p in of_image.parameters():
            p.normal_()
    assert torch.equal(model(**text).logits, plain)
    assert (model(**given).logits - want).abs().max() > 1e-2
    with torch.no_grad():
        for p in of_text.parameters():
            p.normal_()
    assert (model(**text).logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize("act", ["none", "gelu"])
def test_adalink__is_the_formula_for_each_modality(act: str) -> None:
    """The language model alone, given embeddings that were edited by hand."""
    model, given = llava(), with_image()
    adapter = gw.graft(model, gw.AdaLink(4, act=act, at=BOTH))
    spread(adapter)
    plain = llava()
    tokens, image = given["input_ids"], given["input_ids"] == IMAGE_TOKEN
    e = plain.get_input_embeddings()(tokens)
    patches = plain.get_image_features(pixel_values=given["pixel_values"]).pooler_output
    e = e.masked_scatter(image[..., None], torch.cat(list(patches)))
    for delta, mine in zip(adapter.deltas(), (~image, image), strict=True):
        down, up = delta.parameters()
        edit = F.linear(F.gelu(F.linear(e, down)) if act == "gelu" else F.linear(e, down), up)
        e = torch.where(mine[..., None], e + edit, e)
    torch.testing.assert_close(model(**given).logits, plain(inputs_embeds=e).logits)


def test_adalink__a_linear_text_module_folds_into_the_embedding_table() -> None:
    for make in (llama, t5):
        model: Any = make()
        given = {"input_ids": ids()} | ({"decoder_input_ids": ids(seed=4)} if make is t5 else {})
        adapter = gw.graft(model, gw.AdaLink(4))
        spread(adapter)
        want = model(**given).logits
        down, up = adapter.parameters()
        table = model.get_encoder().embed_tokens if make is t5 else model.get_input_embeddings()
        old = table._parameters["weight"].detach().clone()
        gw.merge(model)
        torch.testing.assert_close(table.weight, old + old @ down.T @ up.T)
        torch.testing.assert_close(model(**given).logits, want)
        assert (make()(**given).logits - want).abs().max() > 1e-3
        gw.unmerge(model)
        assert torch.equal(table._parameters["weight"], old)

    model = llava()  # and that of images into the last layer of the projector
    adapter = gw.graft(model, gw.AdaLink(4, at=BOTH))
    spread(adapter)
    want = model(**with_image()).logits
    gw.merge(model)
    torch.testing.assert_close(model(**with_image()).logits, want)


def test_adalink__trains_its_two_factors_and_leaves_blocks_and_length_alone() -> None:
    model = llama()
    adapter = gw.graft(model, gw.AdaLink(4, act="gelu"))
    before = {k: v.clone() for k, v in model.state_dict().items() if "graft" not in k}
    assert {tuple(p.shape) for p in adapter.parameters()} == {(4, 32), (32, 4)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    for _ in range(3):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    assert all(x.shape == (2, 7, 32) for x in seen) and not torch.equal(seen[0], seen[-1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "graft" not in k)

    large = on_meta(lambda: T.LlamaForCausalLM(T.LlamaConfig(num_hidden_layers=3)))
    assert closed_form(large, [gw.AdaLink(64)]) == 2 * 4096 * 64 == gw.graft(large, gw.AdaLink(64)).num_parameters


@pytest.mark.parametrize("make", [bert, gpt2])
def test_adalink__behind_a_whole_embedding_module_it_acts_and_does_not_merge(make: Any) -> None:
    """Positions are added and normed there: no table gives the edited sum."""
    model = make()
    want = model(input_ids=ids()).logits
    adapter = gw.graft(model, gw.AdaLink(4), head=False)
    assert torch.equal(model(input_ids=ids()).logits, want) and adapter.num_parameters == 2 * 4 * 32
    spread(adapter)
    assert (model(input_ids=ids()).logits - want).abs().max() > 1e-4
    with pytest.raises(gw.GraftError, match="adalink"):
        gw.merge(model)


def test_adalink__bad_input_is_refused_by_name() -> None:
    with pytest.raises(gw.GraftError, match="r=0"):
        gw.AdaLink(0)
    with pytest.raises(gw.GraftError, match="act"):
        gw.AdaLink(act="cube")
    with pytest.raises(gw.GraftError, match="embedded"):
        gw.graft(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), gw.AdaLink(2))
    with pytest.raises(gw.GraftError, match="vector"):
        gw.graft(llama(), gw.AdaLink(2, at="norm"))
