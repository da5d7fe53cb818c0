"""Jie et al. 2023: adapters whose matrices have one bit, or a few, for each number."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_models import bert, ids, spread, vit, vit_base
from safetensors.torch import load_file
from weight_models import counts

import graftwork as gw
from graftwork.combinators.bits import packed, unpacked
from graftwork.combinators.codes import coded, decoded, levels, step

pytestmark = pytest.mark.system("bi-adapter")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(w, bits):
    """W^ of a LoRA's matrix, as the pass uses it."""
    adapter = gw.graft(bert(), gw.Quantised(of=gw.LoRA(r=2), bits=bits), head=False)
    return next(adapter.deltas()).rounded(w)


def test_bi_adapter__levels():
    torch.testing.assert_close(levels(1), torch.tensor([-0.6744897502, 0.6744897502], dtype=torch.float64))
    for bits in (1, 2, 3, 4):
        book = levels(bits)
        assert len(book) == 2**bits
        assert (book.diff() > 0).all()
        torch.testing.assert_close(book, -book.flip(0))
        torch.testing.assert_close(step(book), book, atol=1e-6, rtol=0)


def test_bi_adapter__one_bit_takes_two_values():
    w = 0.3 * normal(13, 7) + 0.05
    seen = rounded(w, 1)
    assert len(seen.unique()) == 2
    mu, s = w.mean(), w.std()
    expected = torch.stack([mu - 0.6744897 * s, mu + 0.6744897 * s])
    torch.testing.assert_close(seen.unique(), expected)
    assert torch.equal(seen > mu, w > mu)
    assert len(rounded(w, 2).unique()) == 4


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_bi_adapter__packing_is_exact(bits):
    codes = torch.randint(0, 2**bits, (11, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    held = packed(codes, bits)
    assert held.dtype == torch.uint8
    assert len(held) == math.ceil(77 * bits / 8)
    assert torch.equal(unpacked(held, codes.shape, bits).to(torch.uint8), codes)
    w = normal(11, 7)
    found, mu, s, _ = coded(w, bits)
    assert torch.equal(decoded(found, mu, s, bits), rounded(w, bits))


@pytest.mark.parametrize("bits", [1, 2])
def test_bi_adapter__the_gradient_passes_the_rounding_and_reaches_mean_and_deviation(bits):
    w = normal(7, 9).double().requires_grad_()
    rounded(w, bits).sum().backward()
    codes, mu, s, _ = coded(w.detach(), bits)
    q = levels(bits)[codes.long()]
    expected = 1 + q.sum() * (w.detach() - mu) / ((w.numel() - 1) * s)
    torch.testing.assert_close(w.grad, expected, atol=1e-4, rtol=1e-4)
    assert (w.grad - 1).abs().max() > 1e-2


@pytest.mark.parametrize("bits", [1, 3])
def test_bi_adapter__scaled_and_shifted(bits):
    w = normal(20, 30)
    torch.testing.assert_close(rounded(3.0 * w + 0.7, bits), 3.0 * rounded(w, bits) + 0.7, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "methods"), [(vit, "bi_adapter(h=6)"), (vit, "bi_lora(r=3, bits=2)"), (bert, "bi_adapter(h=5, bits=3)")]
)
def test_bi_adapter__a_file_is_the_training_time_forward(tmp_path, make, methods):
    model = make()
    x = normal(2, 3, 8, 8) if make is vit else ids()
    before = model(x).logits
    adapter = gw.graft(model, gw.parse_methods(methods), "a", head=False)
    near = (model(x).logits - before).abs().max()
    assert 0 < near < 1e-2
    spread(adapter)
    out = model(x).logits
    gw.save(model, "a", tmp_path / "a")
    gw.save(model, "a", tmp_path / "resume", resume=True)
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    bits = adapter.methods[0].bits
    for key, delta in adapter.parts[0].deltas.items():
        for name, p in delta.matrices().items():
            (codes,) = (t for k, t in stored.items() if key in k and k.endswith(f"codes.{name}"))
            assert len(codes) == math.ceil(p.numel() * bits / 8)
    matrices = sum(len(d.matrices()) for d in adapter.deltas())
    assert sum(t.nbytes for t in stored.values() if t.dtype == torch.float32) == 8 * matrices
    for folder in ("a", "resume"):
        again = make()
        gw.load(again, tmp_path / folder, trainable=True)
        assert torch.equal(again(x).logits, out)
    again = make()
    gw.load(again, tmp_path / "a", trainable=True)
    with pytest.raises(gw.GraftError, match="resume=True"):
        again.train()(x)


def stored_bytes(text):
    """Bytes of the codes and of the two numbers per matrix that a file of this adapter holds on ViT-B."""
    (method,) = gw.parse_methods(text)
    adapter = gw.graft(vit_base(), method, head=False)
    sizes = [p.numel() for d in adapter.deltas() for p in d.matrices().values()]
    return sum(math.ceil(n * method.bits / 8) for n in sizes), 8 * len(sizes)


def test_bi_adapter__counts_and_bytes():
    """ViT-B, h = 32: 2 d h numbers a block, 72.0 KiB and two numbers a matrix. The paper's sizes per task, in KiB, are means over
    VTAB-1K with its heads: 47 classes on average, in float32 or at one bit.
    """
    assert counts(vit_base(), gw.parse_methods("bi_adapter")[0]) == (12 * 2 * 768 * 32, 12 * 2 * 768 * 32)
    assert counts(vit_base(), gw.parse_methods("bi_lora")[0]) == (12 * 4 * 768 * 32, 12 * 4 * 768 * 32)
    assert stored_bytes("bi_adapter") == (73_728, 192)
    head = 4 * 768 * 47 / 1024
    for text, with_head, reported in [
        ("bi_adapter", head, 212.9),
        ("bi_lora", head, 285.1),
        ("bi_adapter", head / 32, 76.6),
        ("bi_adapter(h=1)", head / 32, 6.8),
    ]:
        assert sum(stored_bytes(text)) / 1024 + with_head == pytest.approx(reported, abs=0.5)


def test_bi_adapter__lora_merges_and_bad_bits_are_refused():
    model, x = bert(), ids()
    adapter = gw.graft(model, gw.parse_methods("bi_lora(r=4)"), head=False)
    spread(adapter)
    with torch.no_grad():
        out = model(x).logits
        gw.merge(model)
        torch.testing.assert_close(model(x).logits, out, atol=1e-4, rtol=1e-4)
    for options in ({"bits": 0}, {"bits": 9}, {"std": 0.0}, {"of": gw.AdaLoRA()}):
        with pytest.raises(gw.GraftError):
            gw.Quantised(**options)
