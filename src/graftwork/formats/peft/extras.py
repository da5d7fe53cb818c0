"""What a PEFT file may hold beside its method: whole modules, biases, and parameters of the backbone with other values.

All of these are values that stand in the place of the backbone's: here the method `full`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.weight.bitfit import BitFit
from ...methods.weight.full import Full
from ...methods.weight.ln_tuning import LNTuning
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Part, Piece, Spot, grouped, one
from ..places import owner_sites, whole_site
from .config import targets
from .family import PREFIX
from .naming import covering, ends_in

OUTER = "base_model."  # of what is stored beside a prompt, which has no module of PEFT's between


def saved_modules(config: Config, body: Body) -> list[str]:
    """Paths of the modules that modules_to_save names, by the ends of their paths, as PEFT does."""
    names = config.names("modules_to_save")
    found = [path for path in body.modules if path and any(path.endswith(name) for name in names)]
    return [path for path in found if not any(ends_in(path, other) for other in found if other != path)]


def adapted(config: Config, body: Body) -> dict[str, Site]:
    """The sites of the modules that the config names, by path, in the backbone's order; those that are saved whole are apart."""
    chosen = targets(config, body, saved_modules(config, body))
    return {path: whole_site(body, path, config.asked) for path in body.modules if path in chosen}


def in_front(config: Config, body: Body, keys: Collection[str], paths: Collection[str], own: str) -> list[Piece]:
    """Parameters of the backbone that have other values in the file: what the method changes starts from these.

    paths: of the adapted modules.  own: the value of `bias` that means the biases of these.
    """
    bias = config.take("bias", str, "none")
    if bias not in ("none", "all", own):
        raise config.error(f"bias = {bias!r}", f"expected none, all or {own}: restore the file")
    kept = saved_modules(config, body)
    made = []
    for path, module in body.modules.items():
        if any(ends_in(path, one) for one in kept):
            continue
        base = f"{PREFIX}{path}." + ("base_layer." if path in paths else "")
        biased = bias == "all" or (bias == own and path in paths)
        names = tuple(
            name
            for name, p in module._parameters.items()
            if p is not None and (base + name in keys or (name == "bias" and biased))
        )
        if names:
            param = "weight" if "weight" in module._parameters else names[0]
            site = whole_site(body, path, config.asked, param)
            made.append((Full(only=names), [one(base + name, site, f"values.{name}") for name in names]))
    return grouped(made)


def behind(config: Config, body: Body, prefix: str = PREFIX) -> list[Piece]:
    """The modules that are trained whole (modules_to_save)."""
    made = []
    for path in saved_modules(config, body):
        for site in owner_sites(body, path):
            owned = [name for name, p in site.module._parameters.items() if p is not None]
            made.append((Full(), [one(f"{prefix}{site.path}.{name}", site, f"values.{name}") for name in owned]))
    return grouped(made)


def config(held: Held, body: Body, targets: Collection[str], own: str) -> dict[str, Any]:
    """The fields that say what the adapter trains by `full`."""
    whole = [place[0] for m, tensors in held if isinstance(m, Full) and not m.only for place in tensors if place]
    some = {
        place[0] for m, tensors in held if isinstance(m, Full) and m.only == ("bias",) for place in tensors if place
    }
    biased = {path for path, m in body.modules.items() if m._parameters.get("bias") is not None}
    kept = covering(whole, body)
    every = {path for path in biased if not any(ends_in(path, one) for one in kept)}
    bias = own if some and some == biased & set(targets) else "all" if some and some == every else "none"
    return {"bias": bias, "modules_to_save": kept or None}


def valued(method: Method, tensors: Mapping[Spot, dict[str, Tensor]], body: Body) -> Part:
    """A method that stores differences of vectors as one that stores their values; others as they are."""
    if not isinstance(method, BitFit | LNTuning):
        return method, dict(tensors)
    out: dict[Spot, dict[str, Tensor]] = {}
    names: set[str] = set()
    for spot, by_name in tensors.items():
        own = body.modules[spot[0]]._parameters if spot else {}
        shifts = {name.removeprefix("shift."): t for name, t in by_name.items()}
        if any(own.get(name) is None for name in shifts):
            found = f"a bias at {spot}, where the backbone has none"
            raise GraftError(f"write {method} as a PEFT adapter", found, "choose modules that have one")
        names |= shifts.keys()
        out[spot] = {f"values.{name}": own[name].detach() + t for name, t in shifts.items()}  # type: ignore[union-attr]
    return Full(only=() if isinstance(method, LNTuning) else tuple(sorted(names))), out
