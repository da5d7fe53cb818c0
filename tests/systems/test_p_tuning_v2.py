"""P-Tuning v2 (Liu et al. 2022): the acceptance checks of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from attention_models import batch, make, run, scatter

import graftwork as gw
from graftwork.core.method import get

pytestmark = pytest.mark.system("p-tuning-v2")


def roberta_large() -> Any:
    with torch.device("meta"):
        return T.RobertaForSequenceClassification(
            T.RobertaConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=2
            )
        )


@pytest.mark.parametrize("projection", [False, True])
def test_p_tuning_v2__is_a_preset_of_the_prefix(projection: bool) -> None:
    """The same tensors in the prefix plugin give identical logits; there is no second implementation."""
    methods = get("p_tuning_v2")(length=4, projection=projection, mid=8)
    assert [type(m) for m in methods] == [gw.Prefix]
    model, given = make("bert-classifier"), batch("bert", side="right")
    scatter(gw.graft(model, f"p_tuning_v2(length=4, projection={projection}, mid=8)", "v2"))
    wanted = run(model, given)
    tensors = gw.adapters(model)["v2"].state_dict()
    twin = make("bert-classifier")
    prefix = gw.graft(twin, gw.Prefix(4, "mlp" if projection else "flat", mid=8), "prefix")
    assert not torch.allclose(run(twin, given), wanted)
    assert prefix.state_dict().keys() == tensors.keys()
    with torch.no_grad():
        for name, value in prefix.state_dict().items():
            value.copy_(tensors[name])
    assert torch.equal(run(twin, given), wanted)


def test_p_tuning_v2__counts_of_roberta_large() -> None:
    model = roberta_large()
    sizes = {}
    for length in (8, 16):
        adapter = gw.graft(model, f"p_tuning_v2(length={length})", f"v2 {length}")
        prefix, head = adapter.parts
        sizes[length] = sum(p.numel() for delta in prefix.deltas.values() for p in delta.parameters())
        assert sizes[length] == sum(map(prefix.method.count, prefix.sites)) == 2 * 24 * length * 1024
        # the head is the model's own classifier, trained with the prefix and counted apart
        heads = (1024 * 1024 + 1024) + (1024 * 2 + 2)
        assert (
            adapter.num_parameters == sizes[length] + heads == sizes[length] + sum(map(head.method.count, head.sites))
        )
    assert sizes[8] == 393_216 and sizes[16] == 2 * sizes[8]


def test_p_tuning_v2__token_heads_score_the_real_positions_only() -> None:
    model, given = make("bert-tagger"), batch("bert", length=7)
    gw.graft(model, "p_tuning_v2(length=4)")
    assert run(model.eval(), given).shape == (2, 7, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_p_tuning_v2__every_real_token_attends_to_every_prefix_position(side: str) -> None:
    model, given = make("bert"), batch("bert", side=side)
    adapter = gw.graft(model, "p_tuning_v2(length=4)", head=False)
    model.eval()
    mask = given["attention_mask"].bool()
    delta: Any = list(adapter.deltas())[-1]  # the last layer: no token tells another what it saw
    plain = run(model, given)
    for position in range(4):
        with torch.no_grad():
            delta.values[position] += 10
        moved = (run(model, given) - plain).abs().amax(-1)
        with torch.no_grad():
            delta.values[position] -= 10
        assert (moved[mask] > 1e-3).all()
    # and in the first layer too, where positions are known to be apart: gradients reach every row of the prefix
    # from every token
    for row, token in mask.nonzero().tolist():
        (model(**given)[0][row, token].pow(2).sum()).backward()
        first: Any = next(iter(adapter.deltas()))
        assert (first.values.grad.abs().amax(-1) > 0).all()
        first.values.grad = None
