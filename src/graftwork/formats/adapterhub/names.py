"""How AdapterHub's files call the modules of a backbone, and where its adapter layers are in a block.

The names are those of checkpoints: where transformers renamed modules since (ViT), its own table of renamings says how.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ...core.errors import GraftError
from ...core.site import Site
from ...sites.body import Body

WORDS = {"self": "attention_adapters", "cross": "cross_attention_adapters", "mlp": "output_adapters"}
LAST = {"self": "o", "cross": "o", "mlp": "down"}
# before there were names of their own for each: kinds of adapters, and what they are called now
LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}


@dataclass
class Block:
    """One block. index: counted over all towers;  path: in checkpoints;  subs: its sub-layers "self", "cross" and "mlp"."""

    index: int
    path: str
    site: Site
    subs: dict[str, Site] = field(default_factory=dict)


class Names:
    """One backbone, and the name of one adapter in its files."""

    def __init__(self, body: Body, adapter: str) -> None:
        self.body, self.adapter = body, adapter
        self.model: Any = body.modules[""]

    @property
    def settings(self) -> Any:
        """The model's config. GraftError for a model that has none."""
        found = getattr(self.model, "config", None)
        if not isinstance(getattr(found, "hidden_size", None), int):
            raise GraftError(
                "AdapterHub's files", f"{type(self.model).__name__} has no hidden_size", "use a transformers model"
            )
        return found

    @cached_property
    def base(self) -> str:
        """The path of the model without its head, with a dot; empty where the model is that itself."""
        prefix = getattr(self.model, "base_model_prefix", "")
        return f"{prefix}." if prefix and prefix in self.model._modules else ""

    @cached_property
    def old(self) -> dict[str, str]:
        """The path in checkpoints of every module that owns parameters."""
        rename = _renaming(self.model)
        owners = [path for path, m in self.body.modules.items() if any(p is not None for p in m._parameters.values())]
        return {path: rename(f"{path}.weight").rpartition(".")[0] for path in owners}

    def at(self, path: str, kind: str, rest: str) -> str:
        """The key of a tensor: that of the module list `kind` at a path."""
        return f"{path}.{kind}.{self.adapter}.{rest}"

    def shared(self, rest: str) -> str:
        """The key of a tensor that all layers share."""
        return f"{self.base}shared_parameters.{self.adapter}.{rest}"

    # -- blocks -------------------------------------
    @cached_property
    def blocks(self) -> list[Block]:
        """In the order in which AdapterHub counts layers: the encoder's, then the decoder's."""
        found = []
        for index, site in enumerate(self.body.anatomy.of("block")):
            inside = {path: old for path, old in self.old.items() if path.startswith(f"{site.path}.")}
            renamed = any(path != old for path, old in inside.items())
            block = Block(index, _common(inside.values()) if renamed else site.path, site)
            for sub in self.body.anatomy.sites:
                if sub.role in ("attn", "mlp") and (sub.tower, sub.layer) == (site.tower, site.layer):
                    block.subs.setdefault("mlp" if sub.role == "mlp" else "cross" if sub.cross else "self", sub)
            found.append(block)
        return found

    def parts(self, block: Block, *roles: str) -> list[Site]:
        """The projections of these roles in a block."""
        place = (block.site.tower, block.site.layer)
        return [s for role in roles for s in self.body.anatomy.sites if s.role == role and (s.tower, s.layer) == place]

    def layer(self, block: Block, which: str) -> str:
        """The path of the module that holds the bottleneck adapters of a sub-layer.

        An output module with a norm of its own is that module itself (BERT, T5); otherwise it is a child of the block, or,
        for a feed-forward layer whose output module does not hold its input (ViT), of that output module.
        """
        out = self._last(block, which)
        home = above = out.rpartition(".")[0]
        while len(above) > len(block.path):
            if any(norm.rpartition(".")[0] == above for norm in self._norms):
                return above
            above = above.rpartition(".")[0]
        if which == "mlp" and home != block.path and not self._holds_entry(block, which, home):
            return f"{home}.{WORDS[which]}"
        return f"{block.path}.{WORDS[which]}"

    def normed_after(self, block: Block, which: str) -> bool:
        """Whether the block is post-norm: the sub-layer's norm is behind the residual add.

        So it is where the norm stands beside the last projection only (BERT), and where no norm closes the stack (BART).
        """
        layer = self.layer(block, which)
        if layer.rpartition(".")[2] not in WORDS.values():
            return not self._holds_entry(block, which, layer)
        order = list(self.body.modules)
        last = max(order.index(b.site.path) for b in self.blocks if b.site.tower == block.site.tower)
        return not any(
            order.index(norm.path) > last
            and "emb" not in norm.path.rpartition(".")[2]
            and block.site.path.startswith(norm.path.rpartition(".")[0])
            and not any(norm.path.startswith(f"{b.site.path}.") for b in self.blocks)
            for norm in self.body.anatomy.of("norm")
        )

    def norm_site(self, block: Block, which: str) -> Site | None:
        """The norm of a sub-layer, as a site of its own."""
        return self.body.sites.get(f"{block.subs[which].norm}:norm")

    @cached_property
    def _norms(self) -> set[str]:
        return {self.old[site.path] for site in self.body.anatomy.of("norm") if site.path in self.old}

    def _last(self, block: Block, which: str) -> str:
        found = [s for s in self.parts(block, LAST[which]) if which == "mlp" or s.cross == (which == "cross")]
        if not found:
            raise GraftError(
                f"the {which} adapter of {block.path}", "no last projection is known", "keep graftwork's format"
            )
        return self.old[found[0].path]

    def _holds_entry(self, block: Block, which: str, path: str) -> bool:
        entry = self.old.get(str(block.subs[which].entry), "")
        return entry.startswith(f"{path}.")


def _common(paths: Iterable[str]) -> str:
    """The longest path above all of them."""
    words = [path.split(".") for path in paths]
    same = next((i for i, step in enumerate(zip(*words, strict=False)) if len(set(step)) > 1), 0)
    return ".".join(words[0][:same]) if words else ""


def _renaming(model: Any) -> Any:
    """Own names of parameters -> those of checkpoints."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

    if not isinstance(model, PreTrainedModel):
        return lambda name: name
    forward = get_model_conversion_mapping(model, add_legacy=False)
    plain = [one for one in forward if isinstance(one, WeightRenaming) and not isinstance(one, PrefixChange)]
    backward: Any = [one.reverse_transform() for one in reversed(plain)]
    return lambda name: apply_renamings(name, backward)


def as_here(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The tensors under today's names, and with the prefix that this model has: a file may come from one with another head, or none."""
    own = f"{getattr(names.model, 'base_model_prefix', '')}."
    made = {}
    for key, value in tensors.items():
        for old, new in LEGACY.items():
            key = key.replace(f".{old}.{names.adapter}.", f".{new}.{names.adapter}.")
        if own != "." and not names.base:
            key = key.removeprefix(own)
        elif names.base and not key.startswith(names.base):
            key = names.base + key
        made[key] = value
    return made
