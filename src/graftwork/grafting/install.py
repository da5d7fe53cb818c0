"""Hanging deltas into a model, compiling what is active into plans, and taking everything out again.

Nothing here can fail half-way: what may be refused is refused before the first module is touched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.adapter import Adapter, Part
from ..core.armed import Armed
from ..core.attention import caller, register_interface
from ..core.delta import Delta, WeightDelta
from ..core.errors import GraftError
from ..core.grafted import Graft, Grafted, arm, armed, disarm
from ..core.passes import Runtime
from ..core.plan import Plan, read_path
from ..core.quantised import hold_open, let_close
from ..core.site import Site
from ..expressions.mixed import MixedWeight, through
from ..sites.body import Body
from .root import Root, body_of, graft_in, is_grafted, root_of

if TYPE_CHECKING:
    from ..batched.rows import Table
    from ..expressions.branches import Branches

Pieces = Sequence[tuple[Site, Delta]]
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _home(module: nn.Module) -> nn.Module:
    """Where a module's deltas are registered: itself, or, for a container that runs its children in turn, the first that is none."""
    if not isinstance(module, CONTAINERS):
        return module
    return next(m for m in module.modules() if not isinstance(m, (*CONTAINERS, Graft)))


def check_free(model: nn.Module, body: Body) -> None:
    """GraftError where the model cannot carry a registry: inside, or around, another grafted model."""
    runtime = root_of(model).runtime if is_grafted(model) else None
    if runtime is not None and root_of(model).merged is not None:
        asked = f"graft onto {type(model).__name__}"
        raise GraftError(asked, f"{root_of(model).merged} is merged into the weights", "call gw.unmerge first")
    for path, module in body.modules.items():
        child = graft_in(module)
        record = armed(module)
        if (child is not None and not (isinstance(child, Graft) and child.runtime is runtime)) or (
            record is not None and record.runtime is not runtime
        ):
            ours = record is not None or isinstance(child, Graft)
            what = "another model's adapter" if ours else "an attribute of its own named 'graft'"
            raise GraftError(
                f"graft onto {type(model).__name__}",
                f"{path or 'the model'} carries {what}",
                "graft from the outermost model, once",
            )
        if "forward" in module.__dict__ and not isinstance(module, Grafted):
            raise GraftError(
                f"graft onto {type(model).__name__}",
                f"the forward of {path or 'the model'} is replaced on the instance (by accelerate hooks, perhaps)",
                "graft before that, or remove the hooks first",
            )


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The backbone's own parameters by name, each once, as in `Body.numbers`."""
    yield from body_of(model).numbers.items()


def plant(model: nn.Module, adapter: Adapter, body: Body) -> Root:
    """Hang an adapter's deltas under their hosts, and freeze the backbone."""
    if not is_grafted(model):
        root = Root(Runtime(), body)
        root.thawed = [name for name, p in body.parameters.items() if p.requires_grad]
        root.opened = [m for m in body.modules.values() if hold_open(m)]
        root.mask_at = _mask_position(model)
        root.statistics = {
            path for path, m in body.modules.items() if isinstance(m, _BatchNorm) and m.track_running_stats
        }
        if _home(model) is model:
            model.add_module("graft", root)
        else:
            model.__dict__["graft"] = root
    root = root_of(model)
    for p in body.parameters.values():
        if p.requires_grad:
            p.requires_grad_(False)
    for i, part in enumerate(adapter.parts):
        part.shared_modules.train(model.training)
        if len(part.shared_modules):
            _registered(_home(model), root.runtime).add_module(_slot(adapter.name, i, "shared"), part.shared_modules)
        for site in part.sites:
            delta = part.deltas[site.key]
            delta.join(root.runtime)
            delta.train(model.training)  # no dropout in the adapter of a model in evaluation
            home, slot = _place(root, adapter.name, i, site, delta)
            _registered(home, root.runtime)._modules[slot] = delta  # the slot's name is sound and free
    root.adapters[adapter.name] = adapter
    return root


def uproot(model: nn.Module, name: str) -> None:
    """Take an adapter's deltas out; with the last one, everything."""
    root = root_of(model)
    adapter = root.adapters.pop(name)
    root.runtime.stacks.clear()
    for i, part in enumerate(adapter.parts):
        homes = [_place(root, name, i, s, part.deltas[s.key]) for s in part.sites]
        if len(part.shared_modules):
            homes.append((_home(model), _slot(name, i, "shared")))
        for home, slot in homes:
            del home.graft._modules[slot]  # type: ignore[union-attr]
            if not home.graft._modules and not isinstance(home.graft, Root):  # type: ignore[union-attr]
                del home.graft
    if not root.adapters:
        disarm_all(model)
        del model.graft
        for module in root.opened:
            let_close(module)
        names = set(root.thawed)
        for parameter_name, p in model.named_parameters():
            if parameter_name in names:
                p.requires_grad_(True)


def compile_plans(
    model: nn.Module,
    chains: Sequence[Pieces],
    rows: Table | None = None,
    branches: Branches | None = None,
) -> None:
    """Give every module its plan for these deltas in order, and swap classes accordingly: only those that change.

    chains: those of one expression, or of each of the branches;  rows: where given, its groups stand for them.
    """
    root = root_of(model)
    modules = root.body.modules
    bypassable: set[str] = set()
    made = [_plans(root, chain, rows, bypassable) for chain in chains]
    planned = {path for plans in made for path in plans}
    above = {over for path in planned for over in _above(path)}
    if branches is not None:
        above.add("")
    bypassed = {over for path in bypassable for over in _above(path)}
    below = set() if branches is None else set(branches.below(modules, planned, above))
    reached = above | below | root.statistics if planned or branches is not None else set()
    before, root.armed, root.checked = root.armed, [], False
    root.expect(planned)
    for path in sorted(reached | planned):
        module, own = modules[path], tuple(plans.get(path) for plans in made)
        if path not in planned and path and isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        record = armed(module) or Armed(root.runtime, root if path == "" else None)
        record.follow(own, overriding=path in root.statistics or path in bypassed, below=path in below)
        arm(module, tuple({name for plan in own if plan is not None for name in plan.weights}), record)
        root.armed.append(module)
        if branches is not None:
            branches.records.append(record)
    kept = set(map(id, root.armed))
    _disarm(module for module in before if id(module) not in kept)


def _plans(root: Root, chain: Pieces, rows: Table | None, bypassable: set[str]) -> dict[str, Plan]:
    """A plan for each module where something is adapted. bypassable: gets the paths that a fused kernel would pass by."""
    modules = root.body.modules
    plans: dict[str, Plan] = {}
    attends, key = False, ""

    def plan_of(path: str) -> Plan:
        if path not in plans:
            plans[path] = Plan(modules[path])
        if rows is not None:
            rows.host(key, path, modules[path])
        return plans[path]

    for site, delta in chain if rows is None else rows.deltas:
        key = site.key
        _add(plan_of, site, delta)
        attends |= delta.overrides("attend")
        if not isinstance(delta, WeightDelta):
            bypassable.add(_host_path(site, delta))
    for path, step in () if rows is None else rows.steps:
        bypassable.add(path)
        key = step.key
        plan_of(path).rowwise.append(step)
        for name in step.names:
            plan_of(path).weights.setdefault(name, []).append(step)  # type: ignore[arg-type]
    if attends:
        register_interface()
    for path, plan in plans.items() if rows is None else ():
        distinct = list(dict.fromkeys(d for deltas in plan.weights.values() for d in deltas))
        if any(d.overrides("product") for d in distinct):
            plan.rowwise.append(through(modules[path], distinct))
        plan.compile(modules[path])
    return plans


def disarm_all(model: nn.Module) -> None:
    """Give every module its own class back; the adapters stay, inactive."""
    root = root_of(model)
    _disarm(root.armed)
    root.armed = []


def _disarm(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        disarm(module)


@functools.lru_cache(4096)
def _above(path: str) -> tuple[str, ...]:
    """The paths of the modules around it, the model's own among them."""
    return "", *(path.rsplit(".", k)[0] for k in range(1, path.count(".") + 1))


def _add(plan_of: Callable[[str], Plan], site: Site, delta: Delta) -> None:
    here = site.path
    out = here if site.exit is None else site.exit
    if isinstance(delta, WeightDelta | MixedWeight):
        for name in delta.names():
            plan_of(here).weights.setdefault(name, []).append(delta)  # type: ignore[arg-type]
    if delta.overrides("attend"):
        inner = caller(site.module)
        plan_of(".".join(filter(None, (here, inner)))).attend.append(delta)
    if delta.overrides("amend"):
        plan_of(here).amend.append(delta)
    if delta.overrides("around"):
        plan_of(here).around.append(delta)
    if delta.overrides("forward"):
        plan_of(out).forward.append((delta, site.d))
    if delta.overrides("forward") or delta.overrides("around"):
        for place, reader in getattr(delta, "readers", ()) or [(site, delta)]:
            if reader.source != "input":
                plan_of(read_path(place, reader)).capture.append(reader)
    if delta.overrides("enter"):
        edits = plan_of(read_path(site, delta)).enter
        # what the first of several adapters did to the embeddings is undone last
        edits.insert(0 if site.unembed else len(edits), delta)


def check_readable(part: Part) -> None:
    """GraftError where a delta wants an input or output that its site does not have."""
    for site in part.sites:
        delta = part.deltas[site.key]
        if delta.overrides("forward") and (site.rows is not None or site.param != "weight"):
            raise GraftError(
                f"{part.method} at {site.key}",
                f"a part of the weights of {type(site.module).__name__}, which has no output of its own",
                "choose the whole module, or a method of weights (lora)",
            )
        edits = delta.overrides("forward") or delta.overrides("around")
        if delta.overrides("enter") or (edits and delta.source != "input"):
            read_path(site, delta)


def _host_path(site: Site, delta: Delta) -> str:
    return site.exit if site.exit is not None and delta.overrides("forward") else site.path


def _place(root: Root, name: str, i: int, site: Site, delta: Delta) -> tuple[nn.Module, str]:
    """The module a delta is registered under, and the name it has there."""
    host = root.body.modules[_host_path(site, delta)]
    home = _home(host)
    return home, _slot(
        name, i, site.role + ("" if site.param == "weight" else f":{site.param}") if home is host else site.key
    )


def _registered(module: nn.Module, runtime: Runtime) -> Graft:
    """The graft that is a child of `module`."""
    if not isinstance(module._modules.get("graft"), Graft):
        module._modules["graft"] = Graft(runtime)  # `check_free` has seen that the name is free
    return module._modules["graft"]  # type: ignore[return-value]


@functools.lru_cache(4096)
def _quoted(text: str, safe: str) -> str:
    return quote(text, safe=safe).replace(".", "%2E")


def _slot(name: str, i: int, key: str) -> str:
    """A child's name. Adapter names and paths are data: quoted, so that dots and numbers mean nothing."""
    return f"{_quoted(name, '')}:{i}:{_quoted(key, ':')}"


def _mask_position(model: nn.Module) -> int | None:
    names = list(inspect.signature(model.forward).parameters)
    return names.index("attention_mask") if "attention_mask" in names else None
