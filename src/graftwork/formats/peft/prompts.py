"""PEFT's prompts: prompt tuning and p-tuning (both stored as the rows themselves), prefix tuning, adaption prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.attention.llama_adapter import LlamaAdapter
from ...methods.attention.prefix import Prefix
from ...methods.input.prompt import Prompt
from ...sites.body import Body
from ...sites.heads import widths
from ..config import Config
from ..pieces import Held, Piece, Slot, expect, grouped, shaped
from . import extras
from .config import ends
from .family import PREFIX

ROWS = "prompt_embeddings"
# how rows started, what made them during training, and shapes that the backbone knows
LEFT_BEHIND = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "prompt_tuning_init_state_dict_path",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
    "prefix_projection",
    "init_weights",
    "token_dim",
    "num_attention_heads",
    "num_layers",
)


class SoftPrompts:
    """Prompt; where tokens enter the backbone, and in an encoder-decoder in front of the encoder."""

    def __init__(self, peft_type: str) -> None:
        self.peft_type = peft_type

    def claims(self, method: Method) -> bool:
        return isinstance(method, Prompt)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        length = _length(config)
        if config.take("num_transformer_submodules", int, 1) != 1:
            raise config.error(
                "num_transformer_submodules = 2", "a prompt in front of the decoder too is not supported"
            )
        if body.anatomy.of("pooler") and config.data.get("task_type") != "FEATURE_EXTRACTION":
            do = "PEFT pools the first row of the prompt in the place of the first token, which is not supported"
            raise config.error(f"a prompt before {type(body.modules['']).__name__}", do)
        sites = body.anatomy.of("entry")
        first = [site for site in sites if not site.cross]
        if len(first) != 1:
            raise config.error(f"{len(first)} places where tokens enter the backbone", "one is expected")
        slot = shaped(ROWS, first[0], "prompt", *[(length, first[0].d)] * 2)
        piece = Piece(Prompt(length=length), (slot,), bare=tuple(site for site in sites if site.cross))
        return [piece, *extras.behind(config, body, extras.OUTER)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m = next(m for m, _ in held if isinstance(m, Prompt))
        return {
            "num_virtual_tokens": m.length,
            "num_transformer_submodules": 1,
            "modules_to_save": extras.config(held, body, [], "none")["modules_to_save"],
        }


class PrefixTuning:
    """Prefix, in the attention of a decoder; tokens count their positions from behind it."""

    peft_type = "PREFIX_TUNING"

    def claims(self, method: Method) -> bool:
        return isinstance(method, Prefix)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        length = _length(config)
        sites = [site for site in body.anatomy.of("attn") if not site.cross]
        entries = body.anatomy.of("entry")
        if len({site.tower for site in sites}) > 1 or config.take("num_transformer_submodules", int, 1) != 1:
            raise config.error("num_transformer_submodules = 2", "prefixes of an encoder-decoder are not supported")
        if not sites or len(entries) != 1 or any(site.width is None for site in sites):
            raise config.error(f"a prefix on {type(body.modules['']).__name__}", "a decoder of tokens is expected")
        sizes = [width for site in sites for width in widths(site)]

        def here(t: Tensor) -> Sequence[Tensor]:
            return expect(t, (length, sum(sizes))).split(sizes, dim=1)

        places = tuple((site, name) for site in sites for name in ("keys", "values"))
        slot = Slot(ROWS, places, here, lambda ts: torch.cat(list(ts), dim=1))
        piece = Piece(Prefix(length=length, at="attn, entry"), (slot,), bare=tuple(entries))
        return [piece, *extras.behind(config, body, extras.OUTER)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m, tensors = next((m, tensors) for m, tensors in held if isinstance(m, Prefix))
        if not any(spot in tensors for spot in ((s.path, s.param) for s in body.anatomy.of("entry"))):
            found = "tokens count their positions as if it were not there; in PEFT from behind it"
            raise GraftError(f"write {m} as a PEFT adapter", found, "graft it with at='attn, entry'")
        model = getattr(body.modules[""], "config", None)
        heads = getattr(model, "num_key_value_heads", None) or getattr(model, "num_attention_heads", None)
        if heads is None:
            found = f"{type(body.modules['']).__name__} has no config that says its number of heads"
            raise GraftError(f"write {m} as a PEFT adapter", found, "keep it in graftwork's own format")
        return {
            "num_virtual_tokens": m.length,
            "num_transformer_submodules": 1,
            "num_layers": sum(1 for t in tensors.values() if t),
            "token_dim": next(t["keys"].shape[1] for t in tensors.values() if t),
            "num_attention_heads": heads,
            "modules_to_save": extras.config(held, body, [], "none")["modules_to_save"],
        }


class AdaptionPrompt:
    """LlamaAdapter with one gate per layer, which is not squashed."""

    peft_type = "ADAPTION_PROMPT"

    def claims(self, method: Method) -> bool:
        return isinstance(method, LlamaAdapter)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        length, layers = config.take("adapter_len", int, 0), config.take("adapter_layers", int, 0)
        name = config.take("target_modules", str, "self_attn")
        sites = [site for site in body.anatomy.of("attn") if ends(site.path, name)][-layers:] if layers > 0 else []
        if len(sites) != layers or length < 1:
            raise config.error(
                f"adapter_layers = {layers}, adapter_len = {length}", f"{len(sites)} modules end in {name!r}"
            )
        method, made = LlamaAdapter(length=length, gate="scalar", squash="none"), []
        for site in sites:
            if not _apart(body, site):
                do = "PEFT adds the prompt's attention behind the output layer, without projecting it, or adds its bias twice"
                raise config.error(f"{site.path}: its projections are packed, or the last one has a bias", do)
            key = f"{PREFIX}{site.path}.adaption_"
            slots = [
                shaped(f"{key}prompt", site, "prompt", (length, site.d), (1, length, site.d)),
                shaped(f"{key}gate", site, "gate", (1,), (1,)),
            ]
            made.append((method, slots))
        return grouped(made)

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m, tensors = next((m, tensors) for m, tensors in held if isinstance(m, LlamaAdapter))
        names = {spot[0].rpartition(".")[2] for spot in tensors if spot}
        return {"adapter_len": m.length, "adapter_layers": len(tensors), "target_modules": "|".join(sorted(names))}


def _length(config: Config) -> int:
    config.inert(*LEFT_BEHIND)
    length = config.take("num_virtual_tokens", int, 0)
    if length < 1:
        raise config.error(f"num_virtual_tokens = {length}", "restore the file")
    return int(length)


def _apart(body: Body, site: Site) -> bool:
    """Whether queries, keys and values are modules of their own, and the last layer of the attention has no bias."""
    inside = [s for s in body.anatomy.sites if s.path.startswith(f"{site.path}.")]
    apart = {s.role for s in inside if s.rows is None} >= {"q", "k", "v"}
    return apart and not any(s.role == "o" and s.module._parameters.get("bias") is not None for s in inside)
