"""config.json of an intervention folder: where each intervention acts, and of which class it is. pyvene's file names follow."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import GraftError, nearest
from ...core.site import Site
from ...sites.body import Body

CONFIG, ARGUMENTS = "config.json", "args.json"
# of pyvene's RepresentationConfig, whose values stand in this order; a value that is none of ours and not null is refused
FIELDS = (
    *("layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention"),
    *("subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation"),
    *("hidden_source_representation", "latent_dim"),
)
OWN = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_link_key")
# pyreft's class -> the variant of LoReFT
CLASSES = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "DireftIntervention": "direft_orthonormal",
    "NodireftIntervention": "direft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
}
# pyvene's name of an output -> the role of the site
COMPONENTS = {"block_output": "block", "mlp_output": "mlp", "attention_output": "attn"}


@dataclass(frozen=True)
class Intervention:
    """One of a folder. key: its file is intkey_<key>.bin.  turn: 0 for the first at its place, 1 for the second."""

    key: str
    place: tuple[int, str]  # layer and component
    variant: str
    turn: int

    @property
    def file(self) -> str:
        return f"intkey_{self.key}.bin"


def interventions(data: dict[str, Any], asked: str) -> list[Intervention]:
    """What the config lists. GraftError for anything that changes what is computed and is not supported."""
    asked = f"{asked}: {CONFIG}"
    listed, types = data.get("representations"), data.get("intervention_types")
    if not (isinstance(listed, list) and isinstance(types, list) and listed and len(types) == len(listed)):
        raise GraftError(asked, "no representations with their intervention_types", "restore the file")
    if data.get("mode", "parallel") != "parallel":
        raise GraftError(asked, f"mode = {data['mode']!r}", "interventions in parallel are read only")
    turns: Counter[tuple[int, str]] = Counter()
    out = []
    for given, kind in zip(listed, types, strict=True):
        place = _place(given, asked)
        name = str(kind).rpartition(".")[2].rstrip("'>")
        if name not in CLASSES:
            known = ", ".join(CLASSES)
            raise GraftError(asked, f"the intervention {name!r}{nearest(name, CLASSES)}", f"graftwork reads {known}")
        out.append(Intervention(key_of(*place, turns[place]), place, CLASSES[name], turns[place]))
        turns[place] += 1
    return out


def _place(given: Any, asked: str) -> tuple[int, str]:
    values = (
        given if isinstance(given, dict) else dict(zip(FIELDS, given, strict=False)) if isinstance(given, list) else {}
    )
    layer, component = values.get("layer"), values.get("component")
    if not (isinstance(component, str) and (isinstance(layer, int) or (layer is None and "." in component))):
        raise GraftError(asked, f"the representation {given!r}", "restore the file")
    if values.get("unit") != "pos" or values.get("max_number_of_units") != 1:
        found = f"unit = {values.get('unit')!r}, max_number_of_units = {values.get('max_number_of_units')!r}"
        raise GraftError(asked, found, "single positions are edited here")
    for name, value in values.items():
        if name not in OWN and value is not None:
            raise GraftError(asked, f"{name} = {value!r}", "this option is not supported")
    return layer or 0, component


def key_of(layer: int, component: str, turn: int) -> str:
    """pyvene's key of an intervention; the turn counts those at the same place."""
    where = f"comp_{component.replace('.', '_')}" if "." in component else f"layer_{layer}_comp_{component}"
    return f"{where}_unit_pos_nunit_1#{turn}"


def site_of(place: tuple[int, str], body: Body, asked: str) -> Site:
    """The site whose output is edited: of a role in a layer, or the module of a path such as model.layers[3].output."""
    layer, component = place
    if component in COMPONENTS:
        found = [s for s in body.anatomy.of(COMPONENTS[component]) if s.layer == layer and not s.cross]
    else:
        path = re.sub(r"\[(\d+)\]", r".\1", component)
        inside = [
            s for s in body.anatomy.sites if f"{s.path}.output" == path and s.rows is None and s.param == "weight"
        ]
        # of an attention or a feed-forward layer the edited output need not be that of a module with its path
        found = [s for s in inside if s.role == "block"] or [s for s in inside if s.exit is None][:1]
    if len(found) != 1:
        what = f"{len(found)} places are the {component!r} of layer {layer}"
        raise GraftError(asked, what, "load the backbone that it was made for")
    return found[0]


def component_of(site: Site, body: Body, asked: str) -> tuple[int, str]:
    """pyvene's layer and component of a site. GraftError for one that it has no name for."""
    found = next((name for name, role in COMPONENTS.items() if role == site.role), None)
    if found is None or site.layer is None or len(body.anatomy.towers) > 1:
        do = "pyvene names the outputs of blocks, feed-forward layers and attentions of a decoder"
        raise GraftError(asked, f"LoReFT at {site.key}", do)
    return site.layer, found


def config_of(made: Sequence[Intervention], d: dict[str, int], r: int) -> dict[str, Any]:
    """The config of these interventions. d: the width at each, by key."""
    names = {variant: name for name, variant in CLASSES.items()}
    return {
        "intervention_constant_sources": [True for _ in made],
        "intervention_dimensions": [d[one.key] for one in made],
        "intervention_types": [f"<class 'pyreft.interventions.{names[one.variant]}'>" for one in made],
        "mode": "parallel",
        "representations": [[*one.place, "pos", 1, r, *[None] * (len(FIELDS) - 5)] for one in made],
        "sorted_keys": [one.key for one in made],
    }
