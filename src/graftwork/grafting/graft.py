"""The verbs: graft, activate, using, remove, adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..batched import grouping
from ..core.adapter import Adapter, Part
from ..core.delta import WeightDelta
from ..core.errors import GraftError, nearest
from ..core.fields import ranks
from ..core.grafted import armed
from ..core.initial import Later, drawing_from
from ..core.method import Method, flatten, from_json
from ..core.site import Site
from ..core.weight import NO_WEIGHT
from ..expressions.algebra import A, Beside, Expr, Rows, as_expr
from ..expressions.branches import Branches
from ..expressions.mixing import held, made_for, mixed_names, resolved
from ..expressions.pieces import check_heads, compiled, mixed_sites
from ..expressions.places import deltas_of
from ..sites.anatomy import Anatomy
from ..sites.body import Body
from ..sites.where import in_layers, select
from . import install, labels


def graft(
    model: nn.Module,
    methods: Method | str | Sequence[Any],
    name: str = "default",
    *,
    head: bool | None = None,
    seed: int | None = None,
) -> Adapter:
    """Graft a new adapter onto `model`, in place: freeze the backbone, install the deltas, activate them.

    methods: a method, a list of methods (one adapter), or their text, e.g. "lora(r=8)".
    head: train the model's task head with the adapter (None: yes, where there is one and no method does so already).
    seed: of the initial values; None draws one from torch's generator, which is otherwise left alone.
    Raises GraftError (no site matched, a name that exists, ...) and then leaves the model as it was.
    """
    body = install.body_of(model)
    install.check_free(model, body)
    check_name(model, name)
    chosen = list(flatten(methods))
    if not chosen:
        raise GraftError(f"graft {name!r}", "no method", "give at least one, such as gw.LoRA(r=8)")
    found = body.anatomy
    if head is not False and (found.of("head") or head):
        chosen += _head_method(found, chosen, asked=bool(head))
    generator = torch.Generator().manual_seed(
        int(torch.empty((), dtype=torch.int64).random_().item()) if seed is None else seed
    )
    own = {s.key for m in chosen if m.replaces for s in select(found, m.at, m.layers)}
    placed = [(method, _sites(model, method, body, own)) for method in chosen]
    for method, sites in placed:
        _check_ranks(method, sites)
    parts = [build(method, sites, found, generator) for method, sites in placed]
    adapter = Adapter(name, parts)
    attach(model, adapter, body)
    return adapter


def _check_ranks(method: Method, sites: Sequence[Site]) -> None:
    """GraftError for a rank above what any of the sites' weights can have; some of them may be smaller."""
    asked = ranks(method)
    if not asked:
        return
    # the rows of a convolution's matrix belong to groups: its rank is no bound there
    views = [site.weight for site in sites if site.width is None]
    matrices = [w for w in views if w.is_matrix and w.layout != "kernel"]
    largest = max((min(w.d_in, w.d_out) for w in matrices), default=None)
    for name, value in asked.items():
        if largest is not None and value > largest:
            raise GraftError(
                f"graft {method}",
                f"{name}={value}, and none of the {len(matrices)} weights there has a rank above {largest}",
                f"choose {name} <= {largest}, or larger weights by `at`",
            )


def _sites(model: nn.Module, method: Method, body: Body, own: Collection[str]) -> Sequence[Site]:
    """Where a method is grafted: as its `at` says; one that mixes adapters sits where these are.

    own: the sites that the new adapter has values of its own for, which it does not mix.
    """
    if not method.mixes:
        return select(body.anatomy, method.at, method.layers)
    for name in dict.fromkeys(name for e in made_for(method) for name in e.names()):
        find(model, name)
    there = mixed_sites(method, adapters(model), body.modules, own)
    if method.at:
        chosen = {site.key for site in select(body.anatomy, method.at, None)}
        there = [site for site in there if site.key in chosen]
    return in_layers(there, method.layers) if method.layers else there


def attach(model: nn.Module, adapter: Adapter, body: Body) -> None:
    """Hang an adapter that was built for `body` into the model and activate it, or leave the model as it was."""
    before = active(model)
    try:
        install.plant(model, adapter, body)
        activate(model, A(adapter.name))
    except BaseException:
        if install.is_grafted(model) and adapter.name in install.root_of(model).adapters:
            activate(model, before)
            install.uproot(model, adapter.name)
        raise


def _head_method(found: Anatomy, chosen: Sequence[Method], asked: bool) -> list[Method]:
    if asked and not found.of("head"):
        raise GraftError("train the task head", "the model has none", "leave head=None")
    covered = {s.path for m in chosen if m.replaces for s in select(found, m.at, m.layers)}
    if all(s.path in covered for s in found.of("head")):
        return []
    return [from_json({"method": "full", "at": "head"})]


def check_name(model: nn.Module, name: str) -> None:
    """GraftError for a name that is empty, no text, or taken."""
    if not isinstance(name, str) or not name:
        raise GraftError(f"an adapter named {name!r}", "not a name", "give a non-empty text")
    if install.is_grafted(model) and name in install.root_of(model).adapters:
        raise GraftError(
            f"an adapter named {name!r}", "the model has one", "choose another name, or gw.remove it first"
        )


def build(method: Method, sites: Sequence[Site], found: Anatomy, generator: torch.Generator | Later) -> Part:
    """A method's deltas for these sites, drawn as in `drawing_from`; nothing is attached yet."""
    part = Part(method, sites, found)
    kept = []
    with drawing_from(generator):
        for site in sites:
            delta = method.build(site, part)
            if delta is None:
                continue
            stored = site.module._parameters.get(site.param) if isinstance(delta, WeightDelta) else None
            delta.place(site.key, NO_WEIGHT if stored is None else site.weight)
            part.deltas[site.key] = delta
            kept.append(site)
    if not kept:
        raise GraftError(
            f"graft {method}",
            f"it has nothing to do at the {len(sites)} sites of at={method.at!r}",
            "choose another `at`",
        )
    part.sites = kept
    install.check_readable(part)
    return part


def activate(model: nn.Module, expression: Expr | str | None) -> None:
    """Make an expression over adapters the active one; None is the bare backbone, run by its own code.

    Active adapters that are trainable receive gradients, all others do not.
    """
    if expression is None and not install.is_grafted(model):
        return
    root = install.root_of(model)
    if isinstance(expression, str) and expression in root.adapters:
        expression = A(expression)  # a name may hold characters that an expression's text would quote
    given = None if expression is None else as_expr(expression)
    for name in () if given is None else given.names():
        find(model, name)
    e = None if given is None else resolved(given, root.adapters)
    chain = () if e is None else e.names()
    for name in chain:  # with those that a mixing adapter names
        find(model, name)
    if root.merged is not None and chain:
        raise GraftError(f"activate {e}", f"{root.merged} is merged into the weights", "call gw.unmerge first")
    rows = grouping.table(root.body.modules, e, root.adapters, root.runtime) if isinstance(e, Rows) else None
    branches = Branches(given, model) if isinstance(given, Beside) else None
    plain = (
        e.of[:1] if isinstance(e, Rows) else e.of if isinstance(e, Beside) else (e,)
    )  # where all rows have one, the first
    apart = rows is not None and not rows.uniform
    moves = [compiled(t, root.adapters, root.body.modules) if t is not None and not apart else [] for t in plain]
    for t, steps in zip(plain, moves, strict=True):
        check_heads(t, steps)
    chains = [deltas_of(steps) for steps in moves]
    still = held(e, root.adapters)
    install.compile_plans(model, chains, rows if apart else None, branches)
    root.runtime.branches = branches
    root.runtime.rows = rows
    for name in dict.fromkeys((*root.active, *chain)):  # no other has a parameter that asks for gradients
        for p in root.adapters[name].parameters():
            if p.requires_grad != (wanted := name in chain and name not in still and root.adapters[name].trainable):
                p.requires_grad_(wanted)
    root.active, root.expression = chain, None if given is None else str(given)
    stepped = (
        p
        for a in active_adapters(model)
        for part in a.parts
        if "step" in part.method.needs
        for d in part.deltas.values()
        for p in d.parameters()
    )
    root.clock.watch(next(stepped, None))
    headless = mixed_names(e)
    labels.apply(
        model,
        labels.common(
            [a.labels for a in active_adapters(model) if a.labels and a.name not in headless],
            rows is not None or branches is not None,
        ),
    )


@contextmanager
def using(model: nn.Module, expression: Expr | str | None) -> Iterator[nn.Module]:
    """Inside this block, `expression` is active; afterwards, what was active before."""
    before = active(model)
    activate(model, expression)
    try:
        yield model
    finally:
        activate(model, before)


def active(model: nn.Module) -> str | None:
    """The text of the active expression, or None."""
    return install.root_of(model).expression if install.is_grafted(model) else None


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter out. With the last one, the model is bit for bit what it was before the first."""
    root = install.root_of(model)
    find(model, name)
    if root.merged is not None:
        raise GraftError(f"remove {name!r}", f"{root.merged} is merged into the weights", "call gw.unmerge first")
    if name in root.active:
        activate(model, None)
    install.uproot(model, name)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The model's adapters by name."""
    return dict(install.root_of(model).adapters) if install.is_grafted(model) else {}


def keep_weights(model: nn.Module, on: bool = True) -> None:
    """Whether inference (evaluation, no gradients) keeps adapted weights that are dear to make; it does unless told otherwise.

    Kept are W' of DoRA, VeRA and of every weight method on a convolution, an embedding or a packed projection: at most one
    copy of the weights that the active adapters change. LoRA on linear layers keeps nothing. They are made again when a
    tensor they are made of changes, and freed by a training pass, by activating something else, and by on=False.
    A write through `.data` that keeps the memory does not count as a change: activate the adapter again after it.
    """
    root = install.root_of(model)
    root.runtime.keeps_weights = on
    if not on:
        for module in root.armed:
            record = armed(module)
            for plan in () if record is None else record.plans:
                if plan is not None:
                    plan.drop_kept()


def find(model: nn.Module, name: str) -> Adapter:
    """The adapter of this name."""
    known = adapters(model)
    if name not in known:
        raise GraftError(
            f"the adapter {name!r}",
            f"the model has {', '.join(map(repr, known)) or 'none'}{nearest(name, known)}",
            "graft or load it",
        )
    return known[name]


def active_adapters(model: nn.Module) -> list[Adapter]:
    """The adapters that the active expression names."""
    root = install.root_of(model)
    return [root.adapters[name] for name in root.active]
