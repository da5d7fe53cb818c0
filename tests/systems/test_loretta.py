"""Yang et al. 2024: adapters whose matrices are tensor trains, in series and as the factors of a low-rank update."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert, closed_form, ids, llama, llama_of, spread
from weight_models import counts

import graftwork as gw
from graftwork.methods.weight.forms.tensor_train import TensorTrain, count, factors, shape_of

pytestmark = pytest.mark.system("loretta")


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def fill(train, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for core in train.cores:
        core.data = torch.randn(core.shape, generator=generator)
    return train


@pytest.mark.parametrize(
    ("rows", "columns", "shape"),
    [(24, 10, (4, 6, 5, 2)), (24, 10, (4, 6, 10)), (24, 10, (24, 10)), (24, 10, (8, 6, 5)), (768, 64, None)],
)
@torch.no_grad()
def test_loretta__contracted_equals_the_full_matrix(rows, columns, shape):
    train = fill(TensorTrain(rows, columns, shape or shape_of(rows, columns), 5, None))
    assert (train.border is None) == (shape == (8, 6, 5))
    m, x = train.matrix(), torch.randn(3, 4, rows)
    # by the definition, entry by entry
    sizes = [core.shape[1] for core in train.cores]
    for flat in (0, 7, rows * columns // 2, rows * columns - 1):
        product, index = torch.ones(1, 1), torch.unravel_index(torch.tensor(flat), sizes)
        for core, j in zip(train.cores, index, strict=True):
            product = product @ core[:, j]
        close(m.flatten()[flat], product[0, 0], 1e-4)
    scale = (x @ m).abs().max()
    close(train(x) / scale, x @ m / scale)


@torch.no_grad()
def test_loretta__two_cores_of_full_rank_are_any_matrix():
    m = torch.randn(12, 7, dtype=torch.float64)
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    train = TensorTrain(12, 7, (12, 7), 7, torch.empty(0, dtype=torch.float64))
    train.cores[0].data, train.cores[1].data = (u * s)[None], v[..., None]
    close(train.matrix(), m, 1e-12)


@torch.no_grad()
def test_loretta__rank_one_with_two_cores_is_an_outer_product():
    train = fill(TensorTrain(12, 7, (12, 7), 1, None))
    close(train.matrix(), torch.outer(train.cores[0].flatten(), train.cores[1].flatten()))


def test_loretta__one_core_per_factor_is_plain_lora():
    model, other, x = bert(), bert(), ids()
    a = gw.graft(model, gw.LoRETTARep(r=4, alpha=6.0, cores=1), head=False)
    b = gw.graft(other, gw.LoRA(r=4, alpha=6.0), head=False)
    assert a.num_parameters == b.num_parameters
    spread(a)
    for mine, theirs in zip(a.deltas(), b.deltas(), strict=True):
        theirs.down.data = mine.down.cores[0].data.view(-1, 4).T.clone()
        theirs.up.data = mine.up.cores[0].data.view(4, -1).T.clone()
    close(model(x).logits, other(x).logits)


@pytest.mark.parametrize("method", [gw.LoRETTARep(), gw.LoRETTAAdp(bottleneck=16)])
@pytest.mark.parametrize("make", [bert, llama])
def test_loretta__starts_as_the_backbone_and_learns_by_the_last_core(method, make):
    model, x = make(), ids()
    before = model(x).logits
    adapter = gw.graft(model, method, head=False)
    assert torch.equal(model(x).logits, before)
    model(x).logits.square().mean().backward()
    for delta in adapter.deltas():
        *inner, last = delta.up.cores
        assert last.grad.abs().max() > 0
        assert not any(core.grad.any() for core in (*inner, *delta.down.cores))
    released = type(method)(init="released")
    assert not released.identity and method.identity
    other = make()
    gw.graft(other, released, head=False)
    assert (other(x).logits - before).abs().max() > 1e-4


@pytest.mark.parametrize(("shape", "r"), [((4, 6, 5, 2), 1), ((4, 6, 5, 2), 5), ((24, 10), 3), ((240,), 5)])
@torch.no_grad()
def test_loretta__released_numbers_have_one_variance(shape, r):
    """That of the entries, over many draws, whatever the ranks."""
    torch.manual_seed(0)
    total = sum(TensorTrain(24, 10, shape, r, None).matrix().square().mean().item() for _ in range(800)) / 800
    assert total == pytest.approx(1 / 34, rel=0.1)


def test_loretta__counts():
    assert shape_of(4096, 64) == (16, 16, 16, 4, 4, 4) and count(shape_of(4096, 64), 5) == 1100
    assert count(shape_of(64, 4096), 5) == 1100
    assert shape_of(8, 4096) == (16, 16, 8, 4, 4) and count(shape_of(8, 4096), 5) == 800
    model = llama_of(4096, 32, 32, 11008)
    places = gw.LoRETTAAdp(at="o, attn, mlp")
    assert counts(model, places) == (610_560, 610_560)
    norms = gw.Full(at="norm")
    assert closed_form(model, [norms]) == 266_240
    assert closed_form(model, [places, norms]) == 876_800
    rep = gw.LoRETTARep(at="q, v")
    assert counts(model, rep) == (32 * 2 * 1600, 32 * 2 * 1600)
    assert [m.name for m in gw.LoRETTA()] == ["loretta_adp", "full"]


def test_loretta__sizes_are_factored():
    for n in (1, 2, 13, 29, 36, 768, 1000, 2310, 11008, 30522):
        found = factors(n)
        assert torch.tensor(found).prod() == n
        primes = [p for p in range(17, n + 1) if n % p == 0 and all(p % q for q in range(2, int(p**0.5) + 1))]
        assert max(found) <= max([16, *primes])
    assert factors(768, 2) == (32, 24) and factors(30, 1) == (30,)
    assert factors(7, 3) == (7, 1, 1)
