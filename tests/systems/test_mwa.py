"""Wang et al. 2025: checkpoints of one run averaged by their loss or step."""

from __future__ import annotations

import pytest
import torch
from adapter_models import bert
from value_models import by_formula, change, keys, randomly, relative

import graftwork as gw
from graftwork.core.errors import GraftError

mwa = pytest.mark.system("mwa")


def checkpoints(**numbers):
    model = bert()
    count = len(next(iter(numbers.values())))
    for i in range(count):
        adapter = randomly(model, gw.LoRA(r=2, alpha=3.0), f"c{i}", i + 1)
        adapter.metadata |= {key: values[i] for key, values in numbers.items()}
    return model, [f"c{i}" for i in range(count)]


@mwa
@pytest.mark.parametrize("form", ["power", "softmax"])
def test_mwa__p_zero_equal_losses_and_large_p(form):
    model, names = checkpoints(loss=[0.9, 0.4, 2.0, 0.5], step=[100, 200, 300, 400])
    gw.average(model, "uniform", names)
    gw.average(model, "p0", gw.metric_weights(model, names, "loss", p=0.0, form=form))
    for n, t in gw.adapters(model)["uniform"].state_dict().items():
        assert torch.equal(t, gw.adapters(model)["p0"].state_dict()[n])
    best = gw.metric_weights(model, names, "loss", p=200.0, form=form)
    assert best["c1"] > 0.98
    last = gw.metric_weights(model, names, "step", p=200.0, form=form)
    assert last["c3"] == pytest.approx(1.0)
    same, names = checkpoints(loss=[0.7] * 3)
    for p in (0.0, 1.0, 7.0):
        assert gw.metric_weights(same, names, "loss", p=p, form=form) == pytest.approx(dict.fromkeys(names, 1 / 3))


@mwa
def test_mwa__by_hand():
    model, names = checkpoints(loss=[1.0, 2.0], step=[100, 300])
    assert gw.metric_weights(model, names, "loss") == pytest.approx({"c0": 2 / 3, "c1": 1 / 3})
    assert gw.metric_weights(model, names, "step") == pytest.approx({"c0": 1 / 4, "c1": 3 / 4})
    assert gw.metric_weights(model, names, "loss", p=2.0) == pytest.approx({"c0": 4 / 5, "c1": 1 / 5})
    gw.average(model, "new", gw.metric_weights(model, names, "step"))
    for n, t in gw.adapters(model)["new"].state_dict().items():
        a, b = (gw.adapters(model)[x].state_dict()[n] for x in names)
        torch.testing.assert_close(t, 0.25 * a + 0.75 * b)


@mwa
def test_mwa__changes_and_factors():
    model, names = checkpoints(loss=[1.0, 2.0, 4.0])
    weights = gw.metric_weights(model, names, "loss")
    made = gw.combine(model, "changes", weights, "svd", r=6)  # K r
    gw.average(model, "factors", weights)
    assert made.error < 1e-6
    for key in keys(model, "c0"):
        wanted = sum(w * by_formula(model, n, key) for n, w in weights.items())
        assert relative(change(model, "changes", key), wanted) < 1e-5
        assert relative(change(model, "factors", key), wanted) > 0.3
    assert gw.combine(model, "cut", weights, "svd", r=2).error > 0.05


@mwa
def test_mwa__the_unit_of_the_loss_does_not_matter():
    losses = [0.9, 0.4, 2.0]
    model, names = checkpoints(loss=losses)
    other, _ = checkpoints(loss=[1000 * v for v in losses])
    for p in (0.5, 1.0, 3.0):
        assert gw.metric_weights(model, names, p=p) == pytest.approx(gw.metric_weights(other, names, p=p))


@mwa
@pytest.mark.parametrize("value", [None, "low", 0.0, -1.0, float("nan"), float("inf")])
def test_mwa__a_checkpoint_without_the_number_is_refused(value):
    model, names = checkpoints(loss=[1.0, value])
    with pytest.raises(GraftError, match="'c1' has loss="):
        gw.metric_weights(model, names, "loss")
    with pytest.raises(GraftError, match="'c0' has step=None"):
        gw.metric_weights(model, names, "step")
    with pytest.raises(GraftError, match="no such weights"):
        gw.metric_weights(model, names, "accuracy")
    with pytest.raises(GraftError, match="no such weights"):
        gw.metric_weights(model, names, p=-1.0)
