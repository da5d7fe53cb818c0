"""Where adapters are mixed: the deltas of `fuse`, `route` and `split` at an output, in an attention, and at a weight (see `mixing`).

Each asks every member for its own value z_i on the same input, and a `Mixer` for what they make together. They belong to an
activation and own no parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import Attention, chain
from ..core.delta import Delta, WeightDelta
from ..core.errors import GraftError
from ..core.mixer import Members, Mixer
from ..core.plan import Host, channels_first, disjoint, on_rows, reading
from ..core.site import Site
from ..core.swap import swapped
from ..core.unreadable import unreadable
from .sums import AttendSum, EditSum, OutputSum, Term, amended

Call = Callable[..., Tensor]


def _members(terms: Sequence[Term]) -> Members:
    return Members([int(term.c) for term in terms], [term.deltas for term in terms])


class MixedOutput(OutputSum):
    """y' = mix(h, y, [f_i(x_i, y)]), h being what all members read; y where they do not read the same. The c of a term is its number."""

    def __init__(self, terms: Sequence[Term], place: Callable[[Site, Delta], object], mixer: Mixer) -> None:
        super().__init__(terms, place)
        self.mixer, self.of = mixer, _members(terms)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen = {delta: reading(delta, x, self.runtime) for _, delta in self.readers}
        values = []
        for _, deltas in self.terms:
            z = y
            for delta in deltas:
                z = delta.forward(seen.get(delta, x), z)
            values.append(z)
        return self.mixer.mix(self.reads(x, y), y, values, self.of)


class MixedEdit(EditSum):
    """x' = mix(base(x), x, [f_i(x, base)]) for the input x of a module, base(x) being what it gives."""

    def __init__(self, terms: Sequence[Term], mixer: Mixer) -> None:
        super().__init__(terms)
        self.mixer, self.of = mixer, _members(terms)

    def amend(self, x: Tensor, base: Call) -> Tensor:
        y = base(x)
        return self.mixer.mix(y, x, [amended(deltas, x, y, base) for _, deltas in self.terms], self.of)


class MixedAttend(AttendSum):
    """o' = mix(q, o, [f_i(q, k, v)]), all heads of a token side by side."""

    def __init__(self, terms: Sequence[Term], mixer: Mixer) -> None:
        super().__init__(terms)
        self.mixer, self.of = mixer, _members(terms)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
        outs = [chain(deltas, q, k, v, mask, attention) for _, deltas in self.terms]
        own = attention(q, k, v, mask)  # last: what the module says of its attention is the backbone's
        new = self.mixer.mix(_flat(q), _flat(own), list(map(_flat, outs)), self.of)
        return new.unflatten(-1, (own.shape[1], -1)).transpose(1, 2)


def _flat(t: Tensor) -> Tensor:
    """[batch, heads, seq, d_head] as [batch, seq, heads d_head]."""
    return t.transpose(1, 2).flatten(2)


class MixedWeight(Delta):
    """y' = mix(x, y, [z_i]) for a module that is called: y is its output, z_i that with the weights of the i-th member.

    There is no one weight W' for all tokens: who reads the parameter around the module is refused.
    """

    def __init__(self, terms: Sequence[Term], module: nn.Module, mixer: Mixer) -> None:
        super().__init__()
        distinct: list[Any] = list(dict.fromkeys(d for term in terms for d in term.deltas))
        self.members, self.view = nn.ModuleList(distinct), distinct[0].view
        self.mixer, self.of = mixer, _members(terms)
        self.changed: tuple[str, ...] = tuple(dict.fromkeys(name for d in distinct for name in d.names()))
        self.through = [through(module, term.deltas) for term in terms]
        spans = {d.rows if d.overrides("product") else d.view.rows for d in distinct}
        self.rows: tuple[int, int] | None = next(iter(spans)) if len(spans) == 1 else None
        self.channels_first = channels_first(module)
        self.drops = any(not d.overrides("product") and d.dropout for d in distinct)
        self.thin = len(spans) == 1 and all(_low_rank(term.deltas) for term in terms) and type(mixer).mix is Mixer.mix
        if mixer.before and not self.thin:
            found = f"an update that is not of low rank at {distinct[0].key}"
            raise GraftError("mix the factors of adapters (combine='before')", found, "choose combine='after'")

    def names(self) -> tuple[str, ...]:
        """Names of the host's parameters that the members re-parameterise."""
        return self.changed

    def adapted(self, name: str, stored: Tensor | None) -> Tensor | None:
        """What somebody sees who reads the weight around the module: its shape and dtype, no numbers."""
        do = "choose a site whose module is called, or activate these adapters one at a time"
        return unreadable(name, stored, self.key, "token", do)

    def product(self, call: Call, base: Call, x: Tensor, *rest: Any) -> Tensor:
        """y' where `call` gives y for x, and `base` is the module as it is stored."""
        y = call(x, *rest)
        a, b = self.rows or (0, y.shape[-1])
        part = y if self.rows is None else y[..., a:b]
        if self.thin and not (self.drops and self.members[0].training):
            new = self._thin(x, part)
        else:
            known = Known(x, y, call, base)
            values = [z if self.rows is None else z[..., a:b] for z in (t(known, base, x, *rest) for t in self.through)]
            read = self._last(x) if x.is_floating_point() else x
            new = self._stored(self.mixer.mix(read, self._last(part), list(map(self._last, values)), self.of))
        return new if self.rows is None else torch.cat([y[..., :a], new, y[..., b:]], -1)

    def _thin(self, x: Tensor, y: Tensor) -> Tensor:
        """y + sum_i w_i B_i A_i x, all ranks in two products; or the mixed factors, where the mixer says so."""
        of: list[list[Any]] = self.of.deltas  # type: ignore[assignment]
        pairs = [chain[0].factors() for chain in of]
        w = self.mixer.noted(self.mixer.weights(x, y, self.of), self.of).to(x.dtype)
        low = F.linear(x, torch.cat([down for down, _ in pairs])).split([down.shape[0] for down, _ in pairs], -1)
        if self.mixer.before:
            mean = sum(w[..., i, None] * t for i, t in enumerate(low))
            low = tuple(w[..., i, None] * mean for i in range(len(low)))
        else:
            low = tuple(w[..., i, None] * t for i, t in enumerate(low))
        return y + F.linear(torch.cat(low, -1), torch.cat([up for _, up in pairs], -1)).to(y.dtype)

    def _last(self, t: Tensor) -> Tensor:
        return t.movedim(1, -1) if self.channels_first and t.dim() > 2 else t

    def _stored(self, t: Tensor) -> Tensor:
        return t.movedim(-1, 1) if self.channels_first and t.dim() > 2 else t


def _low_rank(deltas: Sequence[Delta]) -> bool:
    one = deltas[0]
    return (
        len(deltas) == 1
        and isinstance(one, WeightDelta)
        and one.additive
        and one.view.linear
        and one.overrides("factors")
    )


class Known:
    """A module whose output y for x is known, and which is called for any other input.

    own: it computes with the stored weight alone.
    """

    def __init__(self, x: Tensor, y: Tensor, call: Call, base: Call) -> None:
        self.x, self.y, self.call, self.own = x, y, call, _own(call, base)

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        return self.y.clone() if x is self.x else self.call(x, *rest)


def _own(call: Call, base: Call) -> bool:
    return call is base or getattr(call, "own", False)


def through(module: nn.Module, deltas: Sequence[Any]) -> Call:
    """(call, base, x, ...) -> y: the module with these deltas at its weights, in order; `call` is what stands in front of them.

    GraftError where one that needs the weight itself stands behind a mixture, which has none.
    """
    if any(d.overrides("product") for d in deltas):
        for d in deltas[1:]:
            if isinstance(d, WeightDelta) and not d.additive:
                found = f"{type(d).__name__} at {d.key} needs the weight that it changes, and a mixture has one for each token"
                raise GraftError("a stack behind a mixture of adapters", found, "put it in front of the mixture")
        return partial(_in_turn, [d.product if d.overrides("product") else _weights(module, [d]) for d in deltas])
    return _weights(module, deltas)


def _weights(module: nn.Module, deltas: Sequence[WeightDelta]) -> Call:
    fast = all(d.view.linear and d.overrides("linear") for d in deltas)
    if fast and (all(d.additive for d in deltas[1:]) or disjoint(list(deltas))):
        return partial(_fast, [(d, Host(module, d.view, first=False)) for d in deltas])
    for d in deltas:
        if d.view.codes is not None and d.view.name in d.names():
            found = "the backbone holds it quantised, and its own layer runs with no other weight"
            raise GraftError(f"the weight of {type(d).__name__} at {d.key} in a mixture", found, "mix it elsewhere")
    return partial(_whole, module, list(deltas))


def _in_turn(steps: Sequence[Call], call: Call, base: Call, x: Tensor, *rest: Any) -> Tensor:
    for step in steps:
        call = partial(step, call, base)
    return call(x, *rest)


def _fast(deltas: Sequence[tuple[WeightDelta, Host]], call: Call, base: Call, x: Tensor, *rest: Any) -> Tensor:
    for delta, host in deltas:
        call = partial(on_rows, delta, call, host) if delta.view.rows else partial(delta.linear, base=call, host=host)
    return call(x, *rest)


def _whole(module: nn.Module, deltas: Sequence[WeightDelta], call: Call, base: Call, x: Tensor, *rest: Any) -> Tensor:
    """The module called with its adapted parameters; behind other deltas, what that changes of the output."""
    values = {name: module._parameters[name] for d in deltas for name in d.names()}
    for d in deltas:
        values |= {name: d.adapted(name, values[name]) for name in d.names()}  # type: ignore[misc]
    with swapped([(module._parameters, name) for name in values], list(values.values())):  # type: ignore[misc]
        new = base(x, *rest)
    return new if _own(call, base) else call(x, *rest) + new - base(x, *rest)
