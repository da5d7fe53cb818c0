"""A soft prompt at work: the module where tokens enter computes with more of them, and hands on the old length."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.initial import parameter
from graftwork.core.site import Site

from .sequence import filler, first_real, insert, shifted, shortened

if TYPE_CHECKING:
    from ..prompt import Prompt


class SoftPrompt(Delta):
    """prompt = P [length, e], or [N, length, e]."""

    def __init__(self, method: Prompt, site: Site, feeds: bool) -> None:
        super().__init__()
        table: Any = site.module.get_submodule(str(site.exit).removeprefix(site.path).removeprefix("."))
        shape = (method.length, site.d) if method.ensemble == 1 else (method.ensemble, method.length, site.d)
        self.prompt = parameter(shape, method.initial(table, table.num_embeddings), next(table.parameters()))
        self.length, self.behind = method.length, method.behind
        self.names, self.feeds = list(inspect.signature(site.module.forward).parameters), feeds
        self.filler = filler(site.module)
        self._module = (site.module,)  # in a tuple: it is the backbone's, not a part of the delta

    def around(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        p, past, mask = self.length, given.get("past_key_values"), given.get("attention_mask")
        x = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        at = first_real(mask, x.shape[0], x.device) + self.behind
        before = self.runtime.mask
        if mask is not None:
            given["attention_mask"] = self.runtime.mask = insert(mask, at, mask.new_ones(mask.shape[0], p))
        try:
            if past is not None and past.get_seq_length() > 0:  # the prompt is in the cache
                if given.get("position_ids") is not None:
                    given["position_ids"] = given["position_ids"] + p
                return base(**given)
            if given.get("position_ids") is not None:
                given["position_ids"] = shifted(given["position_ids"], at, p)
            if given.get("token_type_ids") is not None:
                types = given["token_type_ids"]
                given["token_type_ids"] = insert(
                    types, at, types.gather(1, at.clamp(max=types.shape[1] - 1)).expand(-1, p)
                )
            if x.is_floating_point():
                given["inputs_embeds"] = insert(x, at, self.rows(x.shape[0]))
            else:
                # the model computes all else from ids of the right length; the embeddings of these are replaced
                given["input_ids"] = insert(x, at, x.new_full((x.shape[0], p), self.filler))
                self.runtime.state[self, "at"] = at
            out = base(**given)
        except (IndexError, RuntimeError) as error:
            limit = getattr(getattr(self._module[0], "config", None), "max_position_embeddings", None)
            if limit is None or p + x.shape[1] <= limit:
                raise
            raise GraftError(
                f"a prompt of {p} rows and {x.shape[1]} tokens",
                f"the backbone has {limit} positions ({error})",
                "use a shorter prompt or shorter inputs",
            ) from error
        finally:
            self.runtime.mask = before
        return out if self.feeds else shortened(out, at, p, getattr(self._module[0], "pooler", None))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        at = self.runtime.state.pop((self, "at"), None)
        if at is None:
            return y
        place = (at + torch.arange(self.length, device=y.device))[..., None].expand(-1, -1, y.shape[-1])
        return y.scatter(1, place, self.rows(y.shape[0]).to(y.dtype))

    def rows(self, batch: int) -> Tensor:
        """The prompt of each row [batch, length, e]."""
        if self.prompt.dim() == 2:
            return self.prompt.expand(batch, -1, -1)
        chosen = self.context("prompt_rows")
        if chosen is None or len(chosen) != batch:
            raise GraftError(
                f"several prompts in a batch of {batch}",
                f"prompt_rows={chosen}",
                "set gw.context(model, prompt_rows=...)",
            )
        return self.prompt[torch.as_tensor(chosen, device=self.prompt.device)]
