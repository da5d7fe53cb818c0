"""Thin copies of a backbone's blocks: the same class built from the same config with its widths divided."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.errors import GraftError
from graftwork.core.grafted import original_class
from graftwork.core.initial import constant, kaiming_uniform, parameter, zeros
from graftwork.core.site import Site

# config fields that are widths; what is not among them (heads, layers, experts) stays
_WIDTHS = """
    hidden_size d_model n_embd dim embed_dim hidden_dim intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim
    n_inner d_kv head_dim ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size kv_lora_rank q_lora_rank
    qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim
"""
WIDTHS = tuple(_WIDTHS.split())


def config_of(block: nn.Module) -> Any:
    """The config that the block was built from, or None."""
    return next((m.__dict__["config"] for m in block.modules() if "config" in m.__dict__), None)


def thin_config(config: Any, r: int) -> Any:
    """A copy of the config with every width divided by r."""
    thin = copy.deepcopy(config)
    for name in WIDTHS:
        value = thin.__dict__.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            if value % r:
                raise GraftError(
                    f"side blocks of 1/{r} of the width", f"{name} = {value}", f"choose an r that divides {value}"
                )
            # rotary positions turn pairs of channels: a head of odd width gets one channel more
            setattr(thin, name, value // r + (value // r % 2 if name == "head_dim" else 0))
    return thin


def thin_block(site: Site, r: int, first: bool) -> nn.Module:
    """A block as that of `site`, 1/r as wide. first: it makes what blocks carry along (T5's relative positions)."""
    block = site.module
    cls, config = original_class(type(block)), config_of(block)
    on = next(block.parameters()).device
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if on.type == "meta" else "cpu"):
            if config is not None:
                made = _from_config(cls, block, thin_config(config, r), first)
            elif isinstance(block, nn.TransformerEncoderLayer):
                made = _from_layer(block, r)
            else:
                raise TypeError("it is not built from a config")
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, GraftError):
            raise
        raise GraftError(
            f"a side block of 1/{r} of the width for {site.key}",
            f"{cls.__name__}: {error}",
            "choose another r or model",
        ) from error
    return made.to(on)


def _from_config(cls: type[nn.Module], block: nn.Module, config: Any, first: bool) -> nn.Module:
    given: dict[str, Any] = {}
    for name, wanted in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if name == "config":
            given[name] = config
        elif name.startswith("has_"):
            given[name] = first
        else:
            found = [getattr(m, name) for m in block.modules() if hasattr(m, name)]
            if found:
                given[name] = found[0]
            elif wanted.default is inspect.Parameter.empty and wanted.kind is not inspect.Parameter.VAR_KEYWORD:
                raise TypeError(f"its constructor asks for {name!r}")
    return cls(**given)


def _from_layer(block: nn.TransformerEncoderLayer, r: int) -> nn.Module:
    attention, wide = block.self_attn, block.linear1
    return nn.TransformerEncoderLayer(
        attention.embed_dim // r, attention.num_heads, wide.out_features // r, block.dropout.p, block.activation,
        block.norm1.eps, attention.batch_first, block.norm_first, wide.bias is not None,
    )  # fmt: skip


def initialise(block: nn.Module, like: Tensor) -> None:
    """Random values from the adapter's generator: norms the identity, biases zero, matrices kaiming-uniform."""
    for module in block.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                one = p.dim() == 1 and name == "weight"
                module._parameters[name] = parameter(
                    tuple(p.shape), constant(1.0) if one else zeros if p.dim() == 1 else kaiming_uniform(), like
                )
