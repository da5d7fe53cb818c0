"""PEFT's Poly: poly_lora_A [splits, skills, in / splits, r], poly_lora_B [splits, skills, r, out / splits], and the logits of
each module's router [tasks, splits skills]. Its tasks have numbers, no names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from ...core.errors import GraftError
from ...core.method import Method
from ...core.site import Site
from ...methods.weight.poly import Poly
from ...sites.body import Body
from ..config import Config
from ..pieces import Held, Piece, Slot, expect, grouped, one, shaped
from ..places import whole_site
from . import extras
from .config import targets
from .family import PREFIX
from .naming import named

MOST = 2**16  # tasks, each of which gets a name here


class PolySkills:
    """Poly with a learned router at each linear layer; splits > 1 is MHR."""

    peft_type = "POLY"

    def claims(self, method: Method) -> bool:
        return isinstance(method, Poly)

    def pieces(self, config: Config, body: Body, keys: Collection[str]) -> list[Piece]:
        config.inert("init_weights")
        kind = config.take("poly_type", str, "poly")
        if kind != "poly":
            raise config.error(f"poly_type = {kind!r}", "only poly is known")
        tasks = config.take("n_tasks", int, 1)
        if tasks > MOST:
            raise config.error(f"n_tasks = {tasks}", f"at most {MOST:,} are read: restore the file")
        method = Poly(
            r=config.take("r", int, 8),
            skills=config.take("n_skills", int, 4),
            splits=config.take("n_splits", int, 1),
            tasks=tuple(map(str, range(tasks))),
        )
        chosen = targets(config, body, extras.saved_modules(config, body))
        made = []
        for path in (path for path in body.modules if path in chosen):
            site = whole_site(body, path, config.asked)
            w = site.weight
            if not isinstance(site.module, nn.Linear) or w.d_in % method.splits or w.d_out % method.splits:
                raise config.error(f"{path!r}, {type(site.module).__name__}", "PEFT's Poly is for linear layers")
            made.append((method, _slots(f"{PREFIX}{path}.poly_", site, method)))
        return [*grouped(made), *extras.behind(config, body)]

    def config(self, held: Held, body: Body) -> dict[str, Any]:
        m, tensors = next((m, tensors) for m, tensors in held if isinstance(m, Poly))
        if m.shared or m.allocation or m.frozen:
            found = "a router that all sites share, a given allocation, or frozen tasks"
            raise GraftError(f"write {m} as a PEFT adapter", found, "keep it in graftwork's own format")
        paths = [spot[0] for spot in tensors if spot]
        return {
            "r": m.r,
            "n_skills": m.skills,
            "n_splits": m.splits,
            "n_tasks": len(m.tasks),
            "target_modules": named(paths, body),
            "modules_to_save": extras.config(held, body, paths, "none")["modules_to_save"],
        }


def _slots(key: str, site: Site, m: Poly) -> list[Slot]:
    w, heads = site.weight, (m.splits, m.skills)
    flat = (len(m.tasks), m.splits * m.skills)

    def turned(name: str, own: str, rows: int, columns: int) -> Slot:
        def here(t: Tensor) -> Tensor:
            return expect(t, (*heads, rows, columns)).mT

        return one(key + name, site, own, here, lambda t: t.mT)

    return [
        turned("lora_A", "down", w.d_in // m.splits, m.r),
        turned("lora_B", "up", m.r, w.d_out // m.splits),
        shaped(f"{key}router.module_logits", site, "router.logits", (flat[0], *heads), flat),
    ]
