"""graftwork: adapt frozen pretrained models with every method of the literature, in one small algebra."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that holds it; imported at first use, so that `import graftwork` costs next to nothing
_HOME = {
    "core.adapter": "Adapter",
    "expressions.algebra": "A rows mean drop",
    "expressions.grammar": "parse",
    "sites.anatomy": "anatomy",
    "core.errors": "GraftError",
    "grafting.graft": "keep_weights graft activate active using remove adapters",
    "grafting.merge": "merge unmerge forget",
    "expressions.mixing": "fuse route split",
    "grafting.watch": "mixing_weights pruned",
    "grafting.moments": "step auxiliary_loss calibrate context",
    "core.method": "Method method preset system",
    "grafting.summary": "summary",
    "core.text": "parse_methods",
    "formats": "save load",
    "store.hub": "push",
    "values.combine": "combine",
    "values.parameters": "average arithmetic scale",
    "values.subtract": "subtract",
    "values.emea": "emea",
    "values.focused": "focused",
    "values.extract": "extract",
    "values.similarity": "similarity",
    "values.soup": "nearest_domains clustered_domains metric_weights",
    "values.library": "prototypes clusters",
    "values.neighbours": "neighbours",
    "values.skills": "add_task mean_skill",
    "values.experts": "add_expert",
    "combinators.generated": "temperature",
    "values.materialise": "materialise",
    "values.recycle": "recycle project",
    "values.share_basis": "share_basis",
    "methods.weight.subspace": "intrinsic_dimension",
    "methods.weight.qlora": "quantisation_errors",
    "schedules.evolution": "evolve",
    "schedules.rewinding": "Rewinding",
    "schedules.spsa": "SPSA",
    "objectives.guidance": "guidance",
    "objectives.complete": "complete_loss",
    "combinators.scores": "grasp_loss synflow_loss",
}
_NAMES = {name: home for home, names in _HOME.items() for name in names.split()}
__all__ = sorted([*_NAMES, "methods"])  # and every method and preset, under the name of its class or function


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    package = importlib.import_module("graftwork.methods")  # registers the methods; callable, it lists them
    importlib.import_module("graftwork.combinators")
    if name == "methods":
        return package
    home = _NAMES.get(name)
    value = _methods().get(name) if home is None else getattr(importlib.import_module(f"graftwork.{home}"), name)
    if value is None:
        raise AttributeError(f"module 'graftwork' has no attribute {name!r}")
    globals()[name] = value
    return value


def _methods() -> dict[str, Any]:
    registry = importlib.import_module("graftwork.core.method")
    return {made.__name__: made for made in (*registry.REGISTRY.values(), *registry.PRESETS.values())}


def __dir__() -> list[str]:
    __getattr__("methods")
    return sorted([*__all__, *_methods()])
