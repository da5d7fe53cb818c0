"""What HF PEFT's files say, and what PEFT leaves out of them without an error.

PEFT builds the modules that the config names, and then takes from the tensors what has their names (load_state_dict with
strict=False): what has no module is dropped; a name that is one of the backbone's own replaces that weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ...core.errors import GraftError, nearest
from ...sites.body import Body
from ..config import OFF, Config
from ..files import read_json
from ..peft import CONFIG, FAMILIES, PICKLE, TENSORS
from ..peft.config import ABOUT, config_of, ends, expression, pattern, targets
from ..peft.family import PREFIX
from ..peft.lora import ABSENT
from .report import Said, tell

FILES = ((TENSORS, PICKLE),)
# names of PEFT's tensors by the type of its config, behind the path of the module
NAMES = {
    "LORA": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "token_adapter"),
    "ADALORA": ("lora_A", "lora_B", "lora_E", "ranknum"),
    "IA3": ("ia3_l",),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "VERA": ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
    "GLORA": ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E"),
    "POLY": ("poly_lora_A", "poly_lora_B", "poly_router"),
    "LN_TUNING": ("ln_tuning_layers",),
    "TRAINABLE_TOKENS": ("trainable_tokens_delta",),
    "ADAPTION_PROMPT": ("adaption_prompt", "adaption_gate"),
    "BEFT": ("beft_bias",),
}
MODEL = "base_model."  # before what the peer's model holds once for all modules
ROWS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
# whose target_modules name the modules of their tensors
TARGETED = ("LORA", "ADALORA", "IA3", "VERA", "LOHA", "LOKR", "POLY", "GLORA")
KEY = re.compile(
    r"(?P<path>.*?)\.(?:base_layer\.)*(?P<name>" + "|".join({n for v in NAMES.values() for n in v}) + r")(\..*)?"
)


class File(nn.Module):
    """A backbone of the modules that the names in a file speak of, with nothing in them."""

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        for path in paths:
            at: nn.Module | None = self
            for word in path.split("."):
                at = at._modules.setdefault(word, nn.Module()) if at is not None else None


def said(folder: Path, tensors: Mapping[str, Tensor]) -> Said:
    """The type and the options that are on; what does not fit together in the files themselves."""
    made = Said()
    config = config_of(read_json(folder / CONFIG), f"check {str(folder)!r}")
    kind = config.data.get("peft_type")
    made.methods = [str(kind)]
    made.options = {k: v for k, v in config.data.items() if k not in (*ABOUT, *ABSENT) and v not in OFF}
    if not isinstance(kind, str) or kind not in FAMILIES:
        made.problems.append(
            f"peft_type = {kind!r}{nearest(str(kind), FAMILIES)}: graftwork reads {', '.join(FAMILIES)}"
        )
        return made
    if all((folder / name).is_file() for name in (TENSORS, PICKLE)):
        made.ignored.append(f"{PICKLE}: {TENSORS} is read in its place")
    try:
        _keys(made, config, str(kind), tensors)
    except GraftError as error:
        made.problems.append(error.found)
    return made


def _keys(made: Said, config: Config, kind: str, tensors: Mapping[str, Tensor]) -> None:
    if kind in ROWS:
        others = [key for key in tensors if key != "prompt_embeddings" and not key.startswith(MODEL)]
        tell(made.ignored, f"of another method than {kind}", others)
    if kind not in NAMES:
        return
    bare = [key for key in tensors if not key.startswith(PREFIX) and key.removeprefix(MODEL) not in NAMES[kind]]
    tell(made.ignored, f"their names do not begin with {PREFIX}", bare)
    found = {key: KEY.fullmatch(key[len(PREFIX) :]) for key in tensors if key.startswith(PREFIX)}
    own = {key: m for key, m in found.items() if m is not None}
    other = [key for key, m in own.items() if m["name"] not in NAMES[kind] or _off(config, key)]
    tell(made.ignored, f"of another method than {kind}, or of an option that is off", other)
    paths = {_path(m) for key, m in own.items() if key not in other and m["name"] != "token_adapter"}
    modules = _named(made, config, paths) if kind in TARGETED else paths
    named = modules | _holders(config, paths)
    unnamed = [key for key, m in own.items() if key not in other and _path(m) in paths - named]
    tell(made.ignored, "the config names no such module as a target", unnamed)
    tell(made.notes, "in PEFT these replace weights of the backbone itself", _over(config, found))
    if kind == "LORA":
        _lora(made, config, {key: m for key, m in own.items() if _path(m) in modules}, tensors)


def _off(config: Config, key: str) -> bool:
    """Whether the tensor belongs to an option that the config does not switch on."""
    magnitude = "lora_magnitude_vector" in key and not config.data.get("use_dora")
    return magnitude or (key.endswith("lora_B.bias") and not config.data.get("lora_bias"))


def _path(match: re.Match[str]) -> str:
    """The module that the config names: of an attention's own output layer, the attention."""
    return match["path"].partition(".base_layer.")[0]


def _named(made: Said, config: Config, paths: set[str]) -> set[str]:
    """Of these modules, those that target_modules names."""
    if not paths or config.data.get("target_modules") == "all-linear":
        return paths
    try:
        return set(paths) & targets(config, Body(File(paths)))
    except GraftError as error:
        made.problems.append(error.found)
        return set()


def _holders(config: Config, paths: Iterable[str]) -> set[str]:
    """Of these modules, those that hold a parameter of target_parameters."""
    holders = [name.rpartition(".")[0] for name in config.names("target_parameters")]
    return {path for path in paths for holder in holders if not holder or ends(path, holder)}


def _over(config: Config, found: Mapping[str, re.Match[str] | None]) -> list[str]:
    """Tensors that are no adapter's, of a module that the config does not save."""
    kept = config.names("modules_to_save")
    biases = config.data.get("bias") not in (None, "none")

    def expected(key: str) -> bool:
        inside = any(f".{name}." in f".{key}" for name in kept)
        return inside or ".base_layer." in key or (biases and key.endswith(".bias"))

    return [key for key, m in found.items() if m is None and not expected(key)]


def _lora(made: Said, config: Config, own: Mapping[str, re.Match[str]], tensors: Mapping[str, Tensor]) -> None:
    there = {(m["path"], m["name"]) for m in own.values()}
    both = {**PAIRS, **{b: a for a, b in PAIRS.items()}}
    alone = [f"{path}.{both[name]}" for path, name in there if name in both and (path, both[name]) not in there]
    tell(made.problems, "missing; PEFT leaves them untrained", sorted(alone))
    for key, m in own.items():
        rank = pattern(config, "rank_pattern", m["path"], config.take("r", int, 8))
        if m["name"] == "lora_A" and tensors[key].dim() == 2 and ".base_layer." not in key:
            r = tensors[key].shape[0]
            if r != rank:
                made.problems.append(f"{key} has rank {r}, the config says {rank}")
    places = {path for path, _ in there} | set(config.names("target_parameters"))
    for field in ("rank_pattern", "alpha_pattern"):
        unused = []
        for text in config.take(field, dict, {}):
            wanted = expression(rf"(.*\.)?({text})$")
            if wanted is not None and not any(map(wanted.match, places)):
                unused.append(text)
        tell(made.ignored, f"in {field}: they match no module of the file", unused)
    if config.data.get("use_dora"):
        made.ignored.append("by transformers' model.load_adapter, not by PEFT: the magnitudes of DoRA")
