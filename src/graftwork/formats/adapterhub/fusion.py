"""AdapterHub's fusion layers: adapter_fusion_config.json with model_adapter_fusion.safetensors, beside the adapters they name.

With u_n what the n-th adapter adds, h what the last one reads:  s = softmax_n(query(h) . key(u_n)),  residual + value(sum_n s_n u_n);
that is `fusion` here. Each layer stands in the module that holds the bottlenecks of its sub-layer.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import GraftError
from ...core.site import Site
from ...expressions.algebra import A
from ...expressions.mixing import made_for
from ...expressions.pieces import mixed_sites
from ...grafting.graft import adapters
from ...methods.routing.fusion import Fusion
from ..config import Config
from ..files import read_json, read_tensors
from ..pieces import Slot, one
from .bottleneck import Bottlenecks
from .compacter import Compacters
from .family import Held
from .heads import is_head
from .names import Names
from .placement import located

CONFIG, SAFE, TORCH = (
    "adapter_fusion_config.json",
    "model_adapter_fusion.safetensors",
    "pytorch_model_adapter_fusion.bin",
)
KIND = "adapter_fusion_layer"
TENSORS = {"query.weight": "query", "query.bias": "query_bias", "key.weight": "key_weight", "key.bias": "key_bias"}
REG = 0.01  # the factor of its regulariser
FUSED = (Bottlenecks(), Compacters())


def read_config(folder: Path, asked: str) -> dict[str, Any]:
    """What the file says, with a name, the adapters' names and a config. GraftError for another."""
    about = read_json(folder / CONFIG)
    name, of = about.get("name"), about.get("adapter_names", about.get("name"))
    of = of.split(",") if isinstance(of, str) else of
    listed = isinstance(of, list) and of and all(isinstance(n, str) and n for n in of)
    if not (isinstance(name, str) and name and listed and isinstance(about.get("config"), dict)):
        raise GraftError(f"{asked}: {CONFIG}", "no name, adapter_names or config", "restore the file")
    return about | {"adapter_names": of}


def read_layers(folder: Path, asked: str) -> dict[str, Tensor]:
    """The tensors of the file."""
    for name in (SAFE, TORCH):
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise GraftError(asked, f"neither {SAFE} nor {TORCH}", "the folder is half-written: restore it")


def method_of(about: Mapping[str, Any], names: Names, asked: str) -> Fusion:
    """The method that a config says. GraftError for a switch that graftwork does not have."""
    config = Config(dict(about["config"]), asked, CONFIG)
    for name, only in (
        ("query", True),
        ("key", True),
        ("query_before_ln", False),
        ("residual_before", False),
        ("temperature", False),
    ):
        if config.take(name, bool, only) is not only:
            raise config.error(
                f"{name} = {not only}", "graftwork reads the static and the dynamic fusion, with their own switches"
            )
    value, reg = config.take("value", bool, True), config.take("regularization", bool, False)
    config.inert("value_before_softmax", "value_initialized")  # V (sum s u) is sum s (V u); and how it started
    dropout = config.take("dropout_prob", (int, float), None) or getattr(
        names.settings, "attention_probs_dropout_prob", 0.0
    )
    config.finish()
    of = tuple(str(A(n)) for n in about["adapter_names"])
    return Fusion(of=of, value=value, dropout=float(dropout), reg=REG if reg and value else 0.0)


def slots(method: Fusion, names: Names, asked: str) -> list[Slot]:
    """Its tensors, where the adapters of the model act. GraftError for adapters that are not there, or that it does not mix."""
    known = adapters(names.model)
    lacking = [n for e in made_for(method) for n in e.names() if n not in known]
    if lacking:
        do = "load the adapters that it fuses first, under the names that its file gives them"
        raise GraftError(asked, f"the model has no adapter {lacking[0]!r}", do)
    found: dict[str, Site] = {}
    for site in mixed_sites(method, known, names.body.modules):
        path = _layer(method, site, known, names, asked)
        if path in found:
            raise GraftError(asked, f"adapters at {found[path].key} and at {site.key}", "fuse adapters of one kind")
        found[path] = site
    listed = TENSORS | ({"value.weight": "value"} if method.value else {})
    return [one(names.at(path, KIND, key), site, name) for path, site in found.items() for key, name in listed.items()]


def _layer(method: Fusion, site: Site, known: Mapping[str, Adapter], names: Names, asked: str) -> str:
    """The module that holds the fusion layer of a site. GraftError where one of the adapters is not mixed as it is here."""
    paths = set()
    for e in made_for(method):
        for part in known[e.names()[0]].parts if isinstance(e, A) else ():
            if site.key not in part.deltas:
                continue
            family = next((f for f in FUSED if f.claims(part.method)), None)
            if family is None:
                raise GraftError(
                    asked, f"{part.method.name} at {site.key}", "AdapterHub fuses bottleneck adapters alone"
                )
            block, which, kind = located(*family.moved(part.method, site, names), names)
            if kind == "parallel" or getattr(part.method, "norm", "none") == "after":
                what = (
                    "beside the sub-layer, whose input it adds once more"
                    if kind == "parallel"
                    else "without their norm"
                )
                found = f"{part.method.name} at {site.key}: AdapterHub's fusion takes such adapters {what}"
                raise GraftError(asked, found, "keep graftwork's own format")
            paths.add(names.layer(block, which))
    if len(paths) != 1:
        raise GraftError(
            asked, f"no one adapter of AdapterHub's at {site.key}", "fuse plain names of adapters of one kind"
        )
    return paths.pop()


def unused(tensors: Mapping[str, Tensor], wanted: set[str], names: Names) -> set[str]:
    """Layers of the file where no adapter acts (leave_out), which its library keeps too."""
    paths = {names.layer(block, which) for block in names.blocks for which in block.subs}
    places = {path for path in paths if not any(key.startswith(f"{path}.{KIND}.") for key in wanted)}
    return {key for key in tensors if any(key.startswith(names.at(path, KIND, "")) for path in places)}


def config_of(method: Fusion, names: Names, before: Any, asked: str) -> dict[str, Any]:
    """The config of a fusion made here, or the one it was read from. GraftError for what no config says."""
    if not all(isinstance(e, A) for e in made_for(method)):
        raise GraftError(asked, f"a fusion of {', '.join(method.of)}", "AdapterHub's are of adapters by name")
    of = [e.names()[0] for e in made_for(method)]
    made = {
        **dict.fromkeys(("key", "query", "value_before_softmax"), True),
        **dict.fromkeys(("query_before_ln", "residual_before", "temperature"), False),
        **dict.fromkeys(("value", "value_initialized"), method.value),
        "regularization": method.reg > 0,
        "dropout_prob": method.dropout or None,
    }
    plain = dataclasses.replace(method, at="", layers=None, reg=REG if method.reg else 0.0, joint=False)
    said = [
        (config, method_of({"config": config, "adapter_names": of}, names, asked))
        for config in (before, made)
        if isinstance(config, dict)
    ]
    exact = next((config for config, there in said if there == plain), None)
    if exact is not None:
        return exact
    config, there = said[-1]
    if dataclasses.replace(there, dropout=method.dropout) != plain:
        found = f"{plain}: AdapterHub attends to what the adapters add, asked by what they read"
        raise GraftError(asked, found, "keep it in graftwork's own format")
    found = f"trained on, it has the dropout of the model's attention there, {there.dropout}: a fusion cannot have none"
    warnings.warn(f"{asked}: {found}", stacklevel=5)
    return config


def written(
    adapter: Adapter, names: Names, before: Any, asked: str
) -> tuple[dict[str, Any], list[str], dict[str, Tensor], list[Held]]:
    """(config, names of the adapters, tensors, head) of the files. GraftError for what they cannot say."""
    kept = [(part, *part.method.fold(part)) for part in adapter.parts]
    head = [
        Held(m, p.sites, p.deltas, own, shared) for p, m, own, shared in kept if all(is_head(m, s) for s in p.sites)
    ]
    fused = [(m, own) for p, m, own, _ in kept if not all(is_head(m, s) for s in p.sites)]
    method, own = fused[0]
    if len(fused) != 1 or not isinstance(method, Fusion):
        found = " + ".join(str(m) for m, _ in fused)
        raise GraftError(asked, found, "AdapterHub has no mixture but a fusion alone: keep graftwork's own format")
    config = config_of(method, names, before, asked)
    listed = slots(method, names, asked)
    missing = own.keys() - {site.key for slot in listed for site, _ in slot.places if site is not None}
    if missing:
        raise GraftError(asked, f"{min(missing)}, where none of its adapters acts", "load all that it was made for")
    tensors = {s.key: own[site.key][name] for s in listed for site, name in s.places if site and site.key in own}
    ready = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    return config, [e.names()[0] for e in made_for(method)], ready, head
