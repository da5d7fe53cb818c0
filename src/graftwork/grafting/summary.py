"""What is grafted on a model, as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from . import install
from .graft import active, adapters


@dataclass(frozen=True)
class Summary:
    """What `gw.summary` returns. `rows`: one per adapter and method; `backbone`: parameters of the frozen model; print it for the table."""

    backbone: int
    active: str | None
    rows: tuple[dict[str, str | int | float], ...]

    def __str__(self) -> str:
        lines = [f"backbone: {self.backbone:,} parameters; active: {self.active or 'none'}"]
        width = max((len(str(row["method"])) for row in self.rows), default=0)
        for row in self.rows:
            lines.append(
                f"  {row['adapter']!s:<16} {row['method']!s:<{width}}  {row['sites']!s:>28}  "
                f"{row['parameters']:>12,}  {row['percent']:8.4f} %  {row['note']}"
            )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Adapters, methods, sites and parameters of a grafted model. Percentages are of the backbone's parameters."""
    total = sum(p.numel() for _, p in install.base_parameters(model))
    rows: list[dict[str, str | int | float]] = []
    for name, adapter in adapters(model).items():
        for part in adapter.parts:
            count = part.num_parameters
            roles = Counter(site.role for site in part.sites)
            head = part.method.replaces and set(roles) == {"head"}
            rows.append(
                {
                    "adapter": name,
                    "method": str(part.method),
                    "sites": ", ".join(f"{n} {role}" for role, n in roles.items()),
                    "parameters": count,
                    "percent": 100 * count / max(total, 1),
                    "note": "the task head, trained with the adapter" if head else "",
                }
            )
    return Summary(total, active(model), tuple(rows))
