"""Chen et al. 2022: AdaptFormer is the scaled parallel bottleneck, fed in front of the layer's norm."""

from __future__ import annotations

import pytest
import torch
from adapter_models import closed_form, images, spread, vit, vit_base
from modal_models import pictures, swin, vit_of

import graftwork as gw

pytestmark = pytest.mark.system("adaptformer")


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def test_adaptformer__is_the_scaled_parallel_adapter_before_the_norm():
    model, x = vit(layers=1), images()
    adapter = gw.graft(model, gw.AdaptFormer(d=4), head=False)
    spread(adapter)
    (delta,) = adapter.deltas()
    with torch.no_grad(), gw.using(model, None):
        block, h = model.vit.layers[0], model.vit.embeddings(x)
        h = h + block.attention(block.layernorm_before(h))[0]
        normed = block.layernorm_after(h)

        def expected(seen):
            inner = torch.relu(seen @ delta.down.T + delta.down_bias)
            out = h + block.mlp(normed) + 0.1 * (inner @ delta.up.T) + 0.1 * delta.up_bias
            return model.classifier(model.vit.layernorm(out)[:, 0])

        before, after = expected(h), expected(normed)
    torch.testing.assert_close(logits(model, x), before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)
    # the same tensors behind LN2 are the scaled parallel adapter of He et al., to the bit
    outputs = []
    for name, methods in (
        ("shared", gw.AdaptFormer(d=4, norm="shared", dropout=0.0)),
        ("he", gw.Parallel(d=4, scale=0.1)),
    ):
        made = gw.graft(model, methods, name, head=False)
        for (_, p), (_, q) in zip(made.named_parameters(), adapter.named_parameters(), strict=True):
            p.data.copy_(q)
        outputs.append(logits(model, x))
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], after, atol=1e-5, rtol=1e-5)


def test_adaptformer__the_papers_own_norm_and_the_sequential_ablation():
    model, x = vit(layers=1), images()
    outputs = []
    for name, how in (("in", {"norm": "in"}), ("none", {}), ("sequential", {"sequential": True})):
        adapter = gw.graft(model, gw.AdaptFormer(d=4, **how), name, head=False)
        spread(adapter)
        outputs.append(logits(model, x))
    assert gw.adapters(model)["in"].num_parameters == 2 * 32 * 4 + 4 + 32 + 2 * 32
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in outputs[i + 1 :])
    with pytest.raises(gw.GraftError, match="no norm to share"):
        gw.AdaptFormer(norm="shared", sequential=True)
    with pytest.raises(gw.GraftError, match="no such norm"):
        gw.AdaptFormer(norm="out")


@pytest.mark.parametrize("make, x", [(vit, images()), (swin, pictures())])
def test_adaptformer__starts_as_the_backbone_and_up_moves_first(make, x):
    model = make()
    base = logits(model, x)
    adapter = gw.graft(model, gw.AdaptFormer(d=4), head=False)
    assert torch.equal(logits(model, x), base)
    model(x).logits.square().sum().backward()
    for delta in adapter.deltas():
        assert not delta.down.grad.any() and not delta.down_bias.grad.any()
        assert delta.up.grad.any() and delta.up_bias.grad.any()
        assert (
            not delta.up.any() and not delta.down_bias.any() and delta.down.abs().max() <= delta.down.shape[1] ** -0.5
        )


def test_adaptformer__count_of_vit_base_and_of_its_head():
    model = vit_base()
    assert closed_form(model, gw.AdaptFormer()) == 1_189_632
    assert gw.graft(model, gw.AdaptFormer(), head=False).num_parameters == 1_189_632
    with_head = gw.graft(vit_of(labels=100), gw.AdaptFormer())
    assert with_head.num_parameters == 1_189_632 + 76_900 == 1_266_532
    assert gw.system("adaptformer")[0] == gw.AdaptFormer()[0]
