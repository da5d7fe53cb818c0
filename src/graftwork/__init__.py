"""graftwork: adapt frozen pretrained models with every method of the literature, in one small algebra."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that holds it; imported at first use, so that `import graftwork` costs next to nothing
_HOME = {
    "core.adapter": "Adapter",
    "core.algebra": "A rows mean drop",
    "core.grammar": "parse",
    "core.anatomy": "anatomy",
    "core.errors": "GraftError",
    "core.graft": "keep_weights graft activate active using remove adapters",
    "core.merge": "merge unmerge forget",
    "core.mixing": "fuse route split",
    "core.watch": "mixing_weights pruned",
    "core.moments": "step auxiliary_loss calibrate context",
    "core.method": "Method method preset",
    "core.summary": "summary",
    "core.text": "parse_methods",
    "formats": "save load",
    "store.hub": "push",
    "values.combine": "combine",
    "values.parameters": "average arithmetic scale",
    "values.subtract": "subtract",
    "values.emea": "emea",
    "values.extract": "extract",
    "values.similarity": "similarity",
    "values.soup": "nearest_domains clustered_domains metric_weights",
    "values.library": "prototypes clusters",
    "values.neighbours": "neighbours",
    "values.skills": "add_task mean_skill",
    "methods.weight.lora": "LoRA",
    "methods.weight.full": "Full",
    "methods.weight.dora": "DoRA",
    "methods.weight.vera": "VeRA",
    "methods.weight.ia3": "IA3",
    "methods.weight.bitfit": "BitFit",
    "methods.weight.ln_tuning": "LNTuning",
    "methods.weight.adalora": "AdaLoRA",
    "methods.weight.trainable_tokens": "TrainableTokens",
    "methods.weight.poly": "Poly",
    "methods.weight.qlora": "QLoRA quantisation_errors",
    "methods.weight.neuroada": "NeuroAda",
    "methods.weight.lt_sft": "LTSFT",
    "methods.weight.diff_pruning": "DiffPruning",
    "methods.weight.losia": "LoSiA",
    "methods.attention.prefix": "Prefix",
    "methods.attention.llama_adapter": "LlamaAdapter",
    "methods.input.prompt": "Prompt",
    "methods.input.invertible": "Invertible",
    "methods.side.ladder": "Ladder",
    "methods.activation.bottleneck": "Bottleneck",
    "methods.activation.presets": "Houlsby Pfeiffer Parallel AdapterPlus MAM MADXLanguage MADXTask",
    "methods.activation.compacter": "PHM Compacter CompacterPP",
    "methods.activation.loreft": "LoReFT",
    "methods.routing.fusion": "Fusion",
    "methods.routing.weighted": "Weighted Uniform",
    "methods.routing.arrow": "Arrow",
    "combinators.mixture": "Mixture MoV MoLoRA",
    "combinators.generated": "Generated HyperFormer temperature",
    "combinators.materialise": "materialise",
    "combinators.sparse": "Sparse",
    "combinators.adapter_drop": "AdapterDrop",
    "combinators.gated": "Gated UniPELT",
    "combinators.sparse_adapter": "SparseAdapter",
    "combinators.scores": "grasp_loss synflow_loss",
}
_NAMES = {name: home for home, names in _HOME.items() for name in names.split()}
__all__ = sorted([*_NAMES, "methods"])


def __getattr__(name: str) -> Any:
    home = _NAMES.get(name)
    if home is None and name != "methods":
        raise AttributeError(f"module 'graftwork' has no attribute {name!r}")
    package = importlib.import_module("graftwork.methods")  # registers the methods; callable, it lists them
    importlib.import_module("graftwork.combinators")
    if home is None:
        return package
    value = getattr(importlib.import_module(f"graftwork.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
