"""Prompt tuning: trained embeddings in front of the input's.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta
from graftwork.core.errors import GraftError
from graftwork.core.fields import choice, positive, where
from graftwork.core.initial import Initial, uniform
from graftwork.core.method import Method, method
from graftwork.core.site import Site

from .forms.sequence import CrossMask
from .forms.soft import SoftPrompt


def _rows(value: Any) -> str:
    ids = (
        [i for row in value for i in (row if isinstance(row, tuple | list) else [row])]
        if isinstance(value, tuple)
        else [""]
    )
    return "" if all(isinstance(i, int) and i >= 0 for i in ids) else "token ids, or tuples of them (their mean)"


@method("prompt")
@dataclass(frozen=True)
class Prompt(Method):
    """Input [P ; X],  P [length, e]: positions the model computes with, and that nobody above it sees.

    The attention mask and the position ids become longer; a padded row has P right before its first real token, so
    that it equals the row alone. The output has the input's length again. In an encoder-decoder P stands in the
    encoder, whose output keeps its positions: the decoder attends to them.
    length: rows of P.  combine: P stands before the first token ("prefix") or behind it ("prefix_after_bos").
    init: "random" U(-0.5, 0.5); "vocab" embeddings of tokens drawn from the first `vocab` ids (the frequent ones);
        "tokens" the embeddings of `tokens`, one row each, the mean where one is a tuple of ids (a class label), further
        rows from the vocabulary.
    ensemble: number of prompts N; the context "prompt_rows", [batch] of 0..N-1, says which one a row has.
    Parameters: N length e.  Source: Lester et al. 2021, section 2; google-research/prompt-tuning.
    When: a very large backbone behind an interface of embeddings, one tiny tensor for each task; weak on small backbones and slow
        to train.
    """

    length: int = positive(100)
    init: str = choice("vocab", "random", "vocab", "tokens")
    tokens: tuple[Any, ...] = dataclasses.field(default=(), metadata={"check": _rows})
    vocab: int = positive(5000)
    combine: str = choice("prefix", "prefix", "prefix_after_bos")
    ensemble: int = positive(1)
    at: str = where("entry")

    identity = False
    lr = 1e-1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tokens", tuple(t if isinstance(t, int) else tuple(t) for t in self.tokens))
        if len(self.tokens) > self.length:
            raise GraftError(
                f"{self}", f"{len(self.tokens)} tokens for {self.length} rows", "give a longer prompt or fewer tokens"
            )

    def build(self, site: Site, part: Part) -> Delta:
        if site.role != "entry":
            raise GraftError(f"{self} at {site.key}", "no place where tokens enter the model", "use at='entry'")
        if site.cross:
            if all(s.cross for s in part.sites):
                raise GraftError(
                    f"{self}",
                    "only the decoder of an encoder-decoder",
                    "use at='entry': the prompt stands in the encoder",
                )
            return CrossMask(self.length, self.behind, site.module)
        feeds = any(s.role == "entry" and s.cross for s in part.anatomy.sites)
        if feeds and not any(s.cross for s in part.sites):
            raise GraftError(f"{self}", "the encoder without the decoder that attends to it", "use at='entry'")
        return SoftPrompt(self, site, feeds)

    @property
    def behind(self) -> int:
        """How many tokens stand before P."""
        return int(self.combine == "prefix_after_bos")

    def count(self, site: Site) -> int:
        return 0 if site.cross else self.ensemble * self.length * site.d

    def initial(self, table: nn.Module, size: int) -> Initial:
        """Fills P [..., length, e]."""
        if self.init == "random":
            return uniform(-0.5, 0.5)

        def fill(t: Tensor, generator: torch.Generator | None) -> None:
            device = next(table.parameters()).device
            drawn = torch.randint(min(self.vocab, size), t.shape[:-1], generator=generator).to(device)
            t.copy_(table(drawn))
            for i, ids in enumerate(self.tokens if self.init == "tokens" else ()):
                t[..., i, :] = (
                    table(torch.tensor([ids] if isinstance(ids, int) else ids, device=device)).float().mean(0)
                )

        return fill
