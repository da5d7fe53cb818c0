"""SparseAdapter as published: He et al. 2022, arXiv 2210.04284."""

from __future__ import annotations

from graftwork.core.method import Method, flatten, get, preset

from .sparse import Sparse


@preset("sparse_adapter")
def SparseAdapter(sparsity: float = 0.4, d: int = 64, widen: int = 1, by: str = "snip") -> list[Method]:
    """SparseAdapter: Houlsby adapters pruned to 1 - sparsity before training; widen=k is Large-Sparse (k times wider,
    1/k of it kept).

    sparsity: the share that is PRUNED (in the official code the option of that name is the share that is kept).
    When: the published recipe of sparse adapters, or their Large-Sparse form.
    """
    (of,) = flatten(get("bottleneck")(d=d * widen, init="houlsby", init_std=0.01, at="self.attn, mlp"))
    return [Sparse(of=of, density=1 / widen if widen > 1 else 1 - sparsity, by=by)]
