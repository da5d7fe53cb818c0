"""The inside of attention: a delta's `attend` stands in for the attention call of a grafted attention module.

Two ways in, chosen by the module itself. A transformers module asks `ALL_ATTENTION_FUNCTIONS` for the implementation
its config names; while the module runs, its config names ours, which hands the call to the deltas with the original
implementation (eager, sdpa, flash) as the base. Everybody else calls `F.scaled_dot_product_attention`, which a
`TorchFunctionMode` around that one module catches (`nn.MultiheadAttention`, timm, diffusers).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import GraftError
from .masks import Tokens, causal_mask, cut, extend
from .plan import first_tensor
from .site import Site

IMPLEMENTATION = "graftwork"


class Attention:
    """The attention call that a delta may use, change or ignore: attention(q, k, v, mask) -> [batch, heads, seq, d].

    Keys and values may be longer than the backbone's own: the extra ones stand in FRONT, are visible to every query,
    and mask and position bias are extended for them here.
    scaling: of the scores q k^T;  groups: query heads per key head.
    input: what the attention module was given, [batch, seq, d].
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[..., Tensor],
        scaling: float,
        groups: int,
        keys: int,
        part: Tensor | Tokens | None = None,
    ) -> None:
        self.module, self._call, self.scaling, self.groups, self.keys = module, call, scaling, groups, keys
        self._part = part
        self.root, self.dropping = self, True  # the backbone's own call; whether it drops probabilities in training

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        extra = k.shape[2] - _keys(self._part, self.keys)
        return self._call(q, k, v, mask, extra) if self._part is None else self._call(q, k, v, mask, extra, self._part)

    @property
    def input(self) -> Tensor:
        record: Any = self.module._armed
        x: Tensor = first_tensor(*record.called)
        return x[self._part] if isinstance(self._part, Tensor) else x

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(scaling q k^T + mask) [batch, heads, queries, keys] before dropout: what unit vectors as values give."""
        units = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        self.root.dropping = False
        p = self.root.on(self._part)(q, k, units, mask)
        self.root.dropping = True
        return p

    def on(self, part: Tensor | Tokens | None) -> Attention:
        """The same attention for some rows of the batch (q, k, v and mask are given for them alone), or for some tokens (q, and k and
        v where it says so, are given for them alone; the mask is that of all)."""
        return self.through(self._call, part)

    def through(self, call: Callable[..., Tensor], part: Tensor | Tokens | None = None) -> Attention:
        """An attention that calls `call` for this one."""
        made = Attention(self.module, call, self.scaling, self.groups, self.keys, part)
        made.root = self.root
        return made


def _keys(part: Tensor | Tokens | None, keys: int) -> int:
    """How many keys of the backbone's own are seen."""
    return part.keys.shape[1] if isinstance(part, Tokens) and part.keys is not None else keys


def projected(rows: Tensor, site: Site, heads: int) -> Tensor:
    """Keys or values [1, heads, n, d_head] of states `rows` [n, d] through the FROZEN projection of a k or v site."""
    view = site.weight
    stored = site.module._parameters[view.name]
    assert stored is not None
    bias = view.bias_of(site.module._parameters[view.bias]) if view.bias else None
    return F.linear(rows, view.dense(stored), bias).view(1, rows.shape[0], heads, -1).transpose(1, 2)


def chain(deltas: Sequence[Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, base: Attention) -> Tensor:
    """The first delta is innermost: the next ones see its attention as their base."""
    call = base
    for delta in deltas:
        call = _seen(delta, call)
    return call(q, k, v, mask)


def _seen(delta: Any, inner: Attention) -> Attention:
    """The attention of a delta on `inner`. Keys that an outer delta put in front are part of what this one is given."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: int, part: Tensor | Tokens | None = None
    ) -> Tensor:
        return delta.attend(q, k, v, mask, inner if part is None else inner.on(part))

    return inner.through(call)


# --- transformers ---------------------------------------------------------------------------------------------------


class _Config:
    """The module's config, naming our implementation."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return IMPLEMENTATION if name == "_attn_implementation" else getattr(self._config, name)


def attending_config(module: Any) -> Any:
    """The property `config` of a grafted class: its own, or, while its attention is caught, one that names ours."""
    try:
        config = module.__dict__["config"]
    except KeyError:
        raise AttributeError(f"{type(module).__name__!r} object has no attribute 'config'") from None
    return _Config(config) if module._armed.attending else config


def uses_interface(module: nn.Module) -> bool:
    """Whether the module asks transformers' attention interface for its implementation."""
    return "config" in module.__dict__ and hasattr(_source(module, "ALL_ATTENTION_FUNCTIONS"), "get_interface")


def caller(module: nn.Module) -> str:
    """Path within `module` of what makes its attention call: itself, or the one inside that asks the interface."""
    inside = [path for path, inner in module.named_modules() if uses_interface(inner)]
    return inside[0] if len(inside) == 1 else ""


def _source(module: nn.Module, name: str) -> Any:
    """A global of the file that defines the module's class or one of its bases."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), name, None)
        if found is not None:
            return found
    return None


def _interface(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Any]:
    """What transformers calls in the place of its own implementation."""
    functions = _source(module, "ALL_ATTENTION_FUNCTIONS")
    name = module.__dict__["config"]._attn_implementation
    implementation = functions.get_interface(name, _source(module, "eager_attention_forward"))
    weights: list[Any] = [None]
    batch, queries, keys = k.shape[0], q.shape[2], k.shape[2]

    def call(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: int, part: Tensor | Tokens | None = None
    ) -> Tensor:
        given = dict(kwargs) if base.dropping else kwargs | {"dropout": 0.0}
        if isinstance(part, Tensor):
            per_row = {
                n: t for n, t in given.items() if isinstance(t, Tensor) and t.dim() > 1 and t.shape[0] == batch > 1
            }
            given |= {n: t[part] for n, t in per_row.items()}
        if extra or isinstance(part, Tokens):
            causal = given.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            if mask is None and causal and queries > 1 and (name == "sdpa" or not extra):
                mask = causal_mask(queries, keys, q.device)[None, None]
            bias = given.get("position_bias")
            if isinstance(part, Tokens):
                mask, bias = cut(mask, part), cut(bias, part)
            mask = extend(mask, extra, _keys(part, keys))
            if bias is not None:
                given["position_bias"] = extend(bias, extra, _keys(part, keys))
        out, weights[0] = implementation(module, q, k, v, mask, **given)
        if part is not None:
            weights[0] = None  # those of some rows or tokens are not those of the batch
        return out.transpose(1, 2)

    scaling = kwargs.get("scaling")
    base = Attention(module, call, q.shape[-1] ** -0.5 if scaling is None else scaling, q.shape[1] // k.shape[1], keys)
    module._armed.attending = False  # the implementation itself may read the config
    try:
        out = chain(module._armed.plan.attend, q, k, v, mask, base)
    finally:
        module._armed.attending = True
    module._armed.runtime.state["attended"] = True
    return out.transpose(1, 2).contiguous(), weights[0]


# --- everybody else -------------------------------------------------------------------------------------------------


def _packed(q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None) -> list[Tensor]:
    """q, k and v through a packed projection."""
    if q is k and k is v:
        return [t.contiguous() for t in F.linear(q, w, b).chunk(3, -1)]
    biases: Sequence[Tensor | None] = [None] * 3 if b is None else b.chunk(3)
    return [F.linear(x, part, bias) for x, part, bias in zip((q, k, v), w.chunk(3), biases, strict=True)]


# F.multi_head_attention_forward without its question whether somebody overrides it, and without two functions of its
# file that cannot be compiled under a mode: the packed projection, and the check of a mask that its use checks anyway
_MULTI_HEAD = FunctionType(
    F.multi_head_attention_forward.__code__,
    {
        **vars(F),
        "has_torch_function": lambda tensors: False,
        "_in_projection_packed": _packed,
        "_check_key_padding_mask": lambda mask, keys, batch: None,
    },
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class _Catch(TorchFunctionMode):
    """Hands `F.scaled_dot_product_attention` calls of one module to the deltas."""

    def __init__(self, module: nn.Module, deltas: Sequence[Any]) -> None:
        super().__init__()
        self.module, self.deltas, self.caught = module, deltas, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:  # it would hand itself to this mode again, and its own call must reach it
                return _MULTI_HEAD(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self.caught = True

        def call(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: int, part: Tensor | Tokens | None = None
        ) -> Tensor:
            causal, dropout = is_causal and mask is None, dropout_p if base.dropping else 0.0
            if causal and (extra or isinstance(part, Tokens)):
                mask, causal = causal_mask(query.shape[2], key.shape[2], q.device), False
            if isinstance(part, Tokens):
                mask = cut(mask, part)
            mask = extend(mask, extra, _keys(part, key.shape[2]))
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=enable_gqa)

        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        base = Attention(self.module, call, scaling, query.shape[1] // key.shape[1], key.shape[2])
        return chain(self.deltas, query, key, value, attn_mask, base)


@contextmanager
def intercept(module: nn.Module, deltas: Sequence[Any]) -> Iterator[None]:
    """While this block runs, the module's attention call goes to the deltas. GraftError if it never came."""
    if uses_interface(module):
        state: dict[Any, Any] = module._armed.runtime.state  # type: ignore[union-attr, assignment]
        state["attended"] = False
        yield
        caught = state.pop("attended", True)
    else:
        catch = _Catch(module, deltas)
        with catch:  # the mode also keeps nn.MultiheadAttention from its fused kernel, which has no attention call
            yield
        caught = catch.caught
    if not caught:
        raise GraftError(
            f"the attention of {type(module).__name__}",
            "it calls neither transformers' attention interface nor F.scaled_dot_product_attention",
            "use attn_implementation='sdpa', or need_weights=False for nn.MultiheadAttention; or another method",
        )


def register_interface() -> None:
    """Make our implementation known to transformers, where transformers is in use."""
    if "transformers" in sys.modules:
        from transformers import AttentionInterface

        AttentionInterface.register(IMPLEMENTATION, _interface)
