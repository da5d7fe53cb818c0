"""Keyed: one copy of a method for each name, of which the context of the batch says the one that acts.

Philip et al. 2020, "Monolingual Adapters for Zero-Shot Neural Machine Translation", EMNLP 2020, section 3; naver/pasero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

from torch import Tensor

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import inner, text, words
from graftwork.core.method import Method, flatten, get, method, preset
from graftwork.core.site import Site

from .inherit import Around
from .named import KeyedDelta, KeyedWeight, Named


@method("keyed")
@dataclass(frozen=True)
class Keyed(Around):
    """Delta_n, n what gw.context(model, BY=n) says: one delta per name at every site; the others neither run nor learn.

    of: the method inside.  names: of its copies (not needed in the context where there is one).
    by: the word of the context, such as "source" for the language that a batch is in.
    A batch has one name; a list or a tensor of numbers, one for each row, is taken where all are the same, and refused otherwise.
    Identity as the method inside; mergeable as that, for the name that the context says.
    When: one model for several languages, domains or customers, that are trained together and never mixed in a batch.
    Parameters: as many times those of the method inside as there are names.  Source: Philip et al. 2020, section 3.
    """

    of: Method = inner("bottleneck")
    names: tuple[str, ...] = words(("default",))
    by: str = text("task")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names or len(set(self.names)) < len(self.names):
            raise GraftError(f"Keyed(names={self.names!r})", "no name, or one twice", "give each name once")
        if not self.by.isidentifier():
            raise GraftError(f"Keyed(by={self.by!r})", "not a word", "give one, as in gw.context(model, source=...)")

    def build(self, site: Site, part: Part) -> Delta | None:
        built = [self.of.build(site, part) for _ in self.names]
        deltas = [delta for delta in built if delta is not None]
        if not deltas:
            return None
        for delta in deltas:
            if isinstance(delta, WeightDelta):
                delta.place(site.key, site.weight)
        return (KeyedWeight if isinstance(deltas[0], WeightDelta) else KeyedDelta)(deltas, self.names, self.by)

    def count(self, site: Site) -> int:
        return len(self.names) * self.of.count(site)

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The stored form of the method inside, for each name."""
        stored, shared = self.of, dict[str, Tensor]()
        own: dict[str, dict[str, Tensor]] = {key: {} for key in part.deltas}
        for i in range(len(self.names)):
            within = Part(self.of, part.sites, part.anatomy)
            within.shared_modules = part.shared_modules
            within.deltas = {key: d.inner()[i] for key, d in part.deltas.items() if isinstance(d, Named)}
            stored, tensors, shared = self.of.fold(within)
            for key, given in tensors.items():
                own[key] |= {f"of.{i}.{name}": t for name, t in given.items()}
        return replace(self, of=stored), own, shared


@preset("monolingual_adapters")
def MonolingualAdapters(
    languages: tuple[str, ...] = ("default",),
    d: int = 64,
    sides: str = "both",
    bilingual: bool = False,
    init: str = "houlsby",
    init_std: float = 1e-3,
) -> list[Method]:
    """z + U relu(D LN(z) + b_D) + b_U on the output z of every layer: of the source language in the encoder, of the target language in
    the decoder, so that N languages serve all N (N - 1) directions, those never trained among them.

    languages: names;  gw.context(model, source="de", target="fr") says the direction of a batch, which is one for all its rows.
    d: bottleneck width (64 for d_model 512, 1024 for 1024).  sides: "both", "encoder" or "decoder".
    bilingual: the baseline, adapters of each direction, gw.context(model, pair="de-fr").
    init: of the bottlenecks: "houlsby" near the identity, "lora" exact.
    When: translation between many languages, from fewer trained directions than there are.
    Parameters: per language (n_enc or n_dec) (2 d_model d + d + d_model + 2 d_model).  Source: Philip et al. 2020, section 3.
    """
    towers = {"both": ("encoder", "decoder"), "encoder": ("encoder",), "decoder": ("decoder",)}.get(sides)
    if towers is None:
        raise GraftError(f"MonolingualAdapters(sides={sides!r})", "no such side", "choose both, encoder or decoder")
    names = tuple(languages)
    if bilingual:
        names = tuple(f"{source}-{target}" for source, target in permutations(names, 2))
    words_of = {"encoder": "pair" if bilingual else "source", "decoder": "pair" if bilingual else "target"}
    (of,) = flatten(get("bottleneck")(d=d, act="relu", norm="before", init=init, init_std=init_std, at="block"))
    return [Keyed(of=of, names=names, by=words_of[tower], at=f"{tower}.block") for tower in towers]
