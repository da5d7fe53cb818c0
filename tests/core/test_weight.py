"""The dense view of every host: `dense` then `restore` is the identity, and the view is the matrix the host multiplies by."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftwork.core.errors import GraftError
from graftwork.core.weight import weight_of


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5))


HOSTS = {
    "linear": (nn.Linear(5, 7), "weight", None, False, (7, 5)),
    "conv1d-transformers": (Conv1D(7, 5), "weight", None, False, (7, 5)),
    "packed rows": (nn.Linear(5, 9), "weight", (3, 6), False, (3, 5)),
    "packed rows, stored transposed": (Conv1D(9, 5), "weight", (3, 6), False, (3, 5)),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, groups=2), "weight", None, False, (6, 18)),
    "conv transpose": (nn.ConvTranspose2d(4, 6, 3), "weight", None, False, (54, 4)),
    "embedding": (nn.Embedding(11, 5), "weight", None, False, (5, 11)),
    "packed attention": (nn.MultiheadAttention(6, 2), "in_proj_weight", (6, 12), False, (6, 6)),
    "experts": (Experts(), "gate_up_proj", None, False, (3, 8, 5)),
    "experts, stored transposed": (Experts(), "gate_up_proj", None, True, (3, 5, 8)),
    "norm": (nn.LayerNorm(6), "weight", None, False, (6,)),
}


@pytest.mark.parametrize("host", HOSTS)
def test_dense_and_restore_are_inverse(host: str) -> None:
    module, name, rows, transposed, shape = HOSTS[host]
    view = weight_of(module, name, rows, transposed)
    stored = module._parameters[name].detach()
    dense = view.dense(stored)
    assert dense.shape == shape == view.shape
    assert torch.equal(view.restore(stored, dense), stored)
    other = torch.randn_like(dense)
    again = view.restore(stored, other)
    assert torch.equal(view.dense(again), other)
    if rows:  # the rest of the packed weight is untouched
        whole = weight_of(module, name, None, transposed)
        keep = [i for i in range(whole.d_out) if not rows[0] <= i < rows[1]]
        assert torch.equal(whole.dense(again)[keep], whole.dense(stored)[keep])


@pytest.mark.parametrize("host", ["linear", "conv1d-transformers"])
def test_a_linear_host_multiplies_by_its_view(host: str) -> None:
    module = HOSTS[host][0]
    view = weight_of(module)
    x = torch.randn(2, 5)
    assert view.linear
    torch.testing.assert_close(module(x), x @ view.dense(module.weight).T + module.bias)


def test_an_embedding_picks_columns_of_its_view() -> None:
    module = HOSTS["embedding"][0]
    view = weight_of(module)
    ids = torch.tensor([3, 0])
    assert view.lookup
    assert torch.equal(module(ids), view.dense(module.weight)[:, ids].T)


def test_a_missing_weight_is_refused_by_name() -> None:
    with pytest.raises(GraftError, match=r"gate_up_proj"):
        weight_of(Experts(), "weight")
