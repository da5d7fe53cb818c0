"""PEFT's trainable tokens: alone, and inside of a LoRA adapter (trainable_token_indices)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ...core.method import Method
from ...core.site import Site
from ...methods.weight.trainable_tokens import TrainableTokens
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, one
from ..places import whole_site
from . import extras
from .config import targets
from .family import PREFIX
from .naming import named


class Tokens:
    """TrainableTokens, the same tokens for all embeddings of the config."""

    peft_type = "TRAINABLE_TOKENS"

    def claims(self, method: Method) -> bool:
        return isinstance(method, TrainableTokens)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_weights")
        ids = config.take("token_indices", list, [])
        chosen = targets(config, body, extras.saved_modules(config, body))
        return [*_pieces(config, body, dict.fromkeys(chosen, ids), ""), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        found = _indices(held)
        modules = extras.config(held, body, [], "none")["modules_to_save"]
        return {
            "token_indices": next(iter(found.values())),
            "target_modules": named(found, body),
            "modules_to_save": modules,
        }


def inside(config: Config, body: Body) -> list[Piece]:
    """The trained tokens of a LoRA adapter."""
    given = config.take("trainable_token_indices", (list, dict), {})
    if isinstance(given, list):
        given = {_input(config, body): given} if given else {}
    paths = {path: ids for name, ids in given.items() for path in body.modules if path.endswith(name)}
    if len(paths) < len(given):
        raise config.error(f"trainable_token_indices = {given!r}", "no module of the backbone has this name")
    return _pieces(config, body, paths, "token_adapter.")


def config_inside(held: Held) -> dict[str, Any]:
    """The field that says which tokens a LoRA adapter trains."""
    return {"trainable_token_indices": _indices(held) or None}


def _indices(held: Held) -> dict[str, list[int]]:
    return {
        spot[0]: list(m.tokens)
        for m, by_spot in held
        if isinstance(m, TrainableTokens)
        for spot, tensors in by_spot.items()
        if spot and tensors
    }


def _pieces(config: Config, body: Body, tokens: Mapping[str, Any], infix: str) -> list[Piece]:
    pieces = []
    done: set[str] = set()
    for path in (path for path in body.modules if path in tokens):
        if path in done:  # an output layer that was listed beside the embedding whose tensor it uses
            continue
        site = whole_site(body, path, config.asked)
        tied = _tied(body, site, config)
        done |= {other.path for other in tied}
        # alone, PEFT stores the rows once for every module that uses them
        stored = [path] if infix else [path, *(other.path for other in tied)]
        slots = tuple(one(f"{PREFIX}{p}.{infix}trainable_tokens_delta", site, "rows") for p in stored)
        method = TrainableTokens(tokens=_ids(config, tokens[path]), at=", ".join(s.role for s in (site, *tied)))
        pieces.append(Piece(method, slots, bare=tuple(tied)))
    return pieces


def _ids(config: Config, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
        raise config.error(f"token indices {given!r}", "expected whole numbers: restore the file")
    return tuple(given)


def _tied(body: Body, site: Site, config: Config) -> list[Site]:
    """The other sites that use the tensor of this one."""
    own = site.module._parameters[site.param]
    paths = [p for p, m in body.modules.items() if m is not site.module and m._parameters.get(site.param) is own]
    sites = [whole_site(body, path, config.asked, site.param) for path in paths]
    if any(s.module._parameters.get("bias") is not None for s in sites):
        config.warnings.append(
            "PEFT leaves out the bias of an output layer that is tied to trained tokens; here it stays"
        )
    return sites


def _input(config: Config, body: Body) -> str:
    """The path of the backbone's token embedding."""
    model: Any = body.modules[""]
    table: nn.Module | None = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    path = next((path for path, module in body.modules.items() if module is table), None)
    if path is None:
        raise config.error(
            "trainable_token_indices is a list", "the backbone does not say which embedding is its input's"
        )
    return path
