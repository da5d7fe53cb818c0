"""BlackVIP (Oh et al. 2023): the acceptance checks of the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from adapter_models import bert, closed_form, llama, vit, vit_base
from torch import Tensor, nn
from vision_models import convnext, larger, pictures, resnet, swin

import graftwork as gw

pytestmark = pytest.mark.system("blackvip")

SMALL = "blackvip(features=12, src_dim=128, grid=2, stages=2, encoder='pixels')"  # images of 8 pixels
BOUNDS = torch.tensor([[-1.7923, -1.7521, -1.4802], [1.9303, 2.0749, 2.1459]])  # of CLIP's colours, as released


def quadratic(phi: Tensor) -> Tensor:
    return (3 * phi * phi - 2 * phi).sum()


def test_blackvip__spsa_is_unbiased_for_a_linear_loss() -> None:
    g = torch.tensor([1.0, -2.0, 0.5, 3.0])
    phi = nn.Parameter(torch.zeros(4))
    optimizer = gw.SPSA(
        [phi], a=1.0, c=0.1, o=0.0, alpha=0.0, b=0.0, draws=40_000, generator=torch.Generator().manual_seed(0)
    )
    value = optimizer.step(lambda: g @ phi)
    torch.testing.assert_close(-phi.detach(), g, atol=0.05, rtol=0)  # one step of length 1 from zero
    assert value == pytest.approx(0, abs=1e-4)


def test_blackvip__one_draw_in_one_dimension_is_the_central_difference() -> None:
    for c in (0.01, 0.5):
        phi = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
        seen: list[float] = []

        def loss(phi: Tensor = phi, seen: list[float] = seen) -> Tensor:
            seen.append(phi.item())
            return quadratic(phi)

        gw.SPSA([phi], a=1.0, c=c, o=0.0, alpha=0.0, b=0.0, draws=1).step(loss)
        high, low = seen
        assert c / 2 <= abs(high - 0.7) <= c and high + low == pytest.approx(1.4)
        central = (quadratic(torch.tensor(high)) - quadratic(torch.tensor(low))).item() / (high - low)
        assert 0.7 - phi.item() == pytest.approx(central, abs=1e-4) == pytest.approx(6 * 0.7 - 2, abs=1e-4)


def test_blackvip__the_correction_and_the_gains() -> None:
    """Constant gradients: in one dimension every estimate of a linear loss is exact."""
    g, a, o, alpha, b = 2.0, 0.1, 1.0, 0.4, 0.9
    for momentum in (0.0, b):
        phi = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
        optimizer = gw.SPSA([phi], a=a, c=0.01, o=o, alpha=alpha, b=momentum, draws=2)
        optimizer.step(lambda phi=phi: g * phi.sum())
        first = phi.item()
        assert first == pytest.approx(-a / (1 + o) ** alpha * (g + momentum * g), rel=1e-6)
        optimizer.step(lambda phi=phi: g * phi.sum())
        a_2 = a / (2 + o) ** alpha
        assert phi.item() - first == pytest.approx(-a_2 * (g + momentum * (momentum * g + g)), rel=1e-6)
    # the size of a perturbation goes down as c / k^gamma
    phi = nn.Parameter(torch.zeros(1000))
    optimizer, widest = gw.SPSA([phi], a=1e-9, c=0.1, gamma=0.5, draws=1), []
    for _ in range(4):
        seen: list[float] = []
        optimizer.step(lambda seen=seen: seen.append(phi.abs().max().item()) or 0.0)
        widest.append(max(seen))
    assert widest == pytest.approx([0.1 / k**0.5 for k in (1, 2, 3, 4)], rel=0.01)


class Engine:
    """Counts passes, and raises where autograd would keep anything or run."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.model, self.given, self.calls = model, given, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        out = self.model(**self.given)
        assert not out.loss.requires_grad and out.logits.grad_fn is None
        return out.loss


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("autograd ran")


def test_blackvip__autograd_never_runs_and_each_draw_asks_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit().train()
    adapter = gw.graft(model, SMALL)
    base = {k: v.clone() for k, v in model.state_dict().items() if "graft" not in k}
    black_box = Engine(model, {"pixel_values": pictures(6), "labels": torch.tensor([0, 1, 0, 1, 0, 1])})
    optimizer = gw.SPSA(adapter.parameters(), draws=5)
    before = [p.detach().clone() for p in adapter.parameters()]
    for name in ("backward", "grad"):
        monkeypatch.setattr(torch.autograd, name, refuse)
    monkeypatch.setattr(Tensor, "backward", refuse)
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        for step in range(1, 4):
            optimizer.step(black_box)
            assert black_box.calls == 2 * 5 * step
    assert all(p.grad is None for p in model.parameters())
    assert all(not torch.equal(p, old) for p, old in zip(adapter.parameters(), before, strict=True))
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items() if "graft" not in k)


def test_blackvip__training_without_a_gradient_lowers_the_loss_of_any_adapter() -> None:
    for text in (SMALL, "bitfit"):
        torch.manual_seed(0)
        model = larger(vit())
        adapter = gw.graft(model, text, seed=0)
        box = Engine(model, {"pixel_values": pictures(6), "labels": torch.tensor([0, 1, 0, 1, 0, 1])})
        with torch.no_grad():
            start = box().item()
        optimizer = gw.SPSA(adapter.parameters(), a=0.02, draws=5)
        for _ in range(40):
            optimizer.step(box)
        with torch.no_grad():
            assert box().item() < start - 0.02


def published(method: Any, delta: Any) -> nn.Sequential:
    """The released decoder, with the adapter's tensors."""
    layers: list[nn.Module] = []
    for n, stage in enumerate(delta.stages):
        c, (between, out) = stage.spread.shape[0], stage.joined.shape[:2]
        groups = min(c, 64) if n == 0 else c
        layers += [
            nn.ConvTranspose2d(c, between, 2, 2, 0, groups=groups),
            nn.ConvTranspose2d(between, out, 1, bias=False),
        ]
        layers += [nn.BatchNorm2d(out), nn.GELU()]
    body = nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 2, 2, 0, bias=False))
    own = [p.detach().clone() for p in delta.parameters()][1:]
    with torch.no_grad():
        for stage, at in zip(delta.stages, range(0, 16, 4), strict=True):
            for p, value in zip(body[at : at + 3].parameters(), stage.parameters(), strict=True):
                p.copy_(value)
        body[-1].weight.copy_(delta.last)
    assert sum(p.numel() for p in body.parameters()) == 9_120 and len(own) == len(list(body.parameters()))
    return body


def test_blackvip__counts_shapes_and_the_released_decoder() -> None:
    base, method = vit_base(), gw.BlackVIP()
    assert gw.graft(base, method, head=False).num_parameters == closed_form(base, [method]) == 9_920
    config = T.ViTConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    model = T.ViTForImageClassification(config).eval()  # images of 224 pixels
    (delta,) = gw.graft(model, method, head=False, seed=0).deltas()
    assert delta.trigger.min() >= 0 and delta.trigger.max() <= 0.1 and delta.trigger.shape == (800,)
    z, images = torch.randn(2, 768), pictures(2, 224)
    body = published(method, delta)
    for training in (True, False):  # statistics of the batch, and running ones that the first pass has moved
        delta.train(training), body.train(training)
        prompt = delta.decode(z)
        assert prompt.shape == (2, 3, 224, 224)
        given = torch.cat([z, delta.trigger.expand(2, -1)], 1).view(2, 32, 7, 7)
        torch.testing.assert_close(prompt, body(given), atol=1e-5, rtol=1e-4)
    seen: list[Tensor] = []
    model.vit.embeddings.patch_embeddings.projection.register_forward_hook(lambda m, args, out: seen.append(out))
    gw.context(model, features=z)
    model(pixel_values=images)
    low, high = (b.view(1, 3, 1, 1) for b in BOUNDS)
    want = torch.maximum(torch.minimum(images + prompt, high), low)
    plain: Any = model.vit.embeddings.patch_embeddings.projection
    with gw.using(model, None):
        torch.testing.assert_close(seen[0], plain(want), atol=1e-3, rtol=1e-3)


def test_blackvip__a_frozen_encoder_gives_the_features() -> None:
    encoder = T.ViTMAEModel(
        T.ViTMAEConfig(
            hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
            mask_ratio=0.0,
        )
    ).eval()  # fmt: skip
    model, images = vit(), pictures()
    adapter = gw.graft(model, "blackvip(features=12, src_dim=128, grid=2, stages=2)", head=False)
    with pytest.raises(gw.GraftError, match="features"):
        model(images)
    noise = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))  # ViT-MAE shuffles its patches
    z = encoder(images, noise=noise).last_hidden_state[:, 0]
    with gw.context(model, features=z):
        out = model(images).logits
    with gw.context(model, features=z.flip(0)):
        other = model(images).logits
    assert not torch.allclose(out, other)
    out.sum().backward()  # whoever has gradients may use them; none reaches the encoder
    assert all(p.grad is None for p in encoder.parameters()) and all(p.grad is not None for p in adapter.parameters())


def test_blackvip__nothing_is_added_at_strength_zero_and_colours_are_held_in_range() -> None:
    model, images = vit(), pictures().clamp(-1.4, 1.9)
    want = model(images).logits
    gw.graft(model, SMALL.replace(")", ", eps_p=0)"), "off", head=False)
    assert torch.equal(model(images).logits, want)
    half = SMALL.replace(")", ", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), eps_p=1000.0)")
    (delta,) = gw.graft(model, half, "far", head=False).deltas()
    edited = delta.amend(images.movedim(1, -1), lambda x: x)
    assert edited.min() == -1 and edited.max() == 1


@pytest.mark.parametrize(("make", "size"), [(swin, 16), (resnet, 32), (convnext, 16)])
def test_blackvip__any_network_that_takes_images(make: Callable[[], nn.Module], size: int) -> None:
    model, images = make(), pictures(size=size)
    want = model(images).logits
    text = f"blackvip(features=12, src_dim=128, grid=2, stages={(size // 2).bit_length() - 1}, encoder='pixels')"
    adapter = gw.graft(model, text, head=False)
    assert len(adapter.sites) == 1 and adapter.num_parameters == closed_form(model, adapter.methods)
    assert (model(images).logits - want).abs().max() > 1e-5


def test_blackvip__bad_input_is_refused_by_name() -> None:
    for text, words in {
        "blackvip(src_dim=1000)": "1000 numbers for 7 x 7",
        "blackvip(src_dim=147)": "147 numbers",
        "blackvip(stages=6)": "stages",
        "blackvip(features=700, encoder='pixels')": "700 features",
        "blackvip(mean=(1, 2))": "three numbers",
        "blackvip(norm='layer')": "layer",
    }.items():
        with pytest.raises(gw.GraftError, match=words):
            gw.graft(vit(), text)
    for model in (llama(), bert()):
        with pytest.raises(gw.GraftError, match="nothing to do"):
            gw.graft(model, "blackvip")
    wrong = vit()
    gw.graft(wrong, SMALL.replace("stages=2", "stages=3"))
    with pytest.raises(gw.GraftError, match=r"\[8, 8, 3\], prompts \[16, 16, 3\]"):
        wrong(pictures())
    phi = nn.Parameter(torch.ones(2))
    with pytest.raises(gw.GraftError, match="draws=0"):
        gw.SPSA([phi], draws=0)
    with pytest.raises(gw.GraftError, match="closure"):
        gw.SPSA([phi]).step()
    with pytest.raises(gw.GraftError, match="nan"):
        gw.SPSA([phi]).step(lambda: float("nan"))
    assert torch.equal(phi, torch.ones(2))
