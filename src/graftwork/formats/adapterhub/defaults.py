"""The fields of AdapterHub's bottleneck configs where nothing else is said, and those that say what an adapter reads."""

from __future__ import annotations

from typing import Any

BOTTLENECK: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "is_parallel": False,
    "use_gating": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "init_weights_seed": None,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "scaling": 1.0,
    "dropout": 0.0,
    "stochastic_depth": 0.0,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
}
SCHEMES: dict[str, dict[str, Any]] = {
    "output": {},
    "sum": {"original_ln_before": True},
    "stream": {"original_ln_before": True, "residual_before_ln": False, "original_ln_after": False},
    "parallel": {"is_parallel": True},
}
