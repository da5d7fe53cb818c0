"""An adapter: a named set of trained parameters, made by a list of methods on one backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from .delta import Delta
from .method import Method
from .site import Site

if TYPE_CHECKING:
    from ..sites.anatomy import Anatomy

T = TypeVar("T", bound=nn.Module)


def quoted(name: str) -> str:
    """The name as a module may call its own: without dots."""
    return name.replace(".", "%2E")


class Part:
    """The share of one method in an adapter: its sites, one delta per site, and the modules its deltas share.

    anatomy: of the whole backbone, for methods that connect several places.
    renewed: parameters that its schedule has begun anew in this step; what an optimiser remembers of them goes (`gw.step`).
    """

    def __init__(self, method: Method, sites: Sequence[Site], anatomy: Anatomy) -> None:
        self.method = method
        self.anatomy = anatomy
        self.sites: list[Site] = list(sites)
        self.deltas: dict[str, Delta] = {}
        self.renewed: list[nn.Parameter] = []
        self.shared_modules = nn.ModuleDict()

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """The shared module of that name, made at its first use. It is trained and stored once for all sites."""
        key = quoted(name)
        if key not in self.shared_modules:
            self.shared_modules[key] = make()
        return self.shared_modules[key]  # type: ignore[return-value]

    def inside(self, site: Site, role: str) -> list[Site]:
        """The sites of `role` in the module of `site` (the k of an attention)."""
        return [
            s
            for s in self.anatomy.of(role)
            if s.path == site.path or s.path.startswith(f"{site.path}." if site.path else "")
        ]

    @property
    def num_parameters(self) -> int:
        """How many numbers it trains."""
        sizes = {id(p): p.numel() for m in (self.shared_modules, *self.deltas.values()) for p in _parameters(m)}
        return sum(sizes.values()) - sum(delta.pruned for delta in self.deltas.values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the part, by "site key/name"; shared ones by "shared/name"."""
        out = {f"shared/{name}": value for name, value in self.shared_modules.state_dict().items()}
        for key, delta in self.deltas.items():
            out |= {f"{key}/{name}": value for name, value in delta.state_dict().items()}
        return out


class Adapter:
    """A named set of trained parameters on one backbone.

    trainable: its parameters receive gradients while it is active.  labels: the class names of its own head, or None.
    metadata: what is stored beside the tensors (data, metrics, how it was trained).
    """

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        self.name = name
        self.parts = list(parts)
        self.trainable = True
        self.labels: tuple[str, ...] | None = None
        self.metadata: dict[str, Any] = {}

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods it is made of, in order."""
        return tuple(part.method for part in self.parts)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every place where it acts, in order; a site appears once per method."""
        return tuple(site for part in self.parts for site in part.sites)

    def deltas(self) -> Iterator[Delta]:
        """Every delta, in order."""
        for part in self.parts:
            yield from part.deltas.values()

    def modules(self) -> Iterator[nn.Module]:
        """Every module that holds its parameters."""
        for part in self.parts:
            yield part.shared_modules
            yield from part.deltas.values()

    def groups(self, lr: float | None = None, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Its parameters as groups of an optimiser, one for each learning rate: lr times what the method says (`Method.rate`,
        `Method.rate_of`).  lr: None takes each method's own (`Method.lr`).  weight_decay: of matrices; vectors (`Delta.role`
        "scale") then have none.
        """
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        seen: set[int] = set()
        for part in self.parts:
            for home in (part.shared_modules, *part.deltas.values()):
                for name, value in home.named_parameters():
                    if id(value) not in seen:
                        seen.add(id(value))
                        role = home.role(name) if isinstance(home, Delta) else ""
                        rate = part.method.rate(name) * part.method.rate_of(role)
                        rate *= part.method.lr if lr is None else lr
                        groups.setdefault((rate, role == "scale" and weight_decay is not None), []).append(value)
        decay = {} if weight_decay is None else {False: {"weight_decay": weight_decay}, True: {"weight_decay": 0.0}}
        return [{"params": given, "lr": rate, **decay.get(bare, {})} for (rate, bare), given in groups.items()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters by the names of `state_dict`, each once."""
        seen: set[int] = set()
        for i, part in enumerate(self.parts):
            homes = [("shared", part.shared_modules), *part.deltas.items()]
            for key, home in homes:
                for name, value in home.named_parameters():
                    if id(value) not in seen:
                        seen.add(id(value))
                        yield f"{i}/{key}/{name}", value

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, each once."""
        seen: set[int] = set()
        for home in self.modules():
            for value in _parameters(home):
                if id(value) not in seen:
                    seen.add(id(value))
                    yield value

    @property
    def num_parameters(self) -> int:
        """How many numbers it trains."""
        return sum(p.numel() for p in self.parameters()) - sum(delta.pruned for delta in self.deltas())

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that training needs, by "method index/site key/name"."""
        return {f"{i}/{name}": value for i, part in enumerate(self.parts) for name, value in part.tensors().items()}

    def __repr__(self) -> str:
        made_of = " + ".join(map(str, self.methods))
        return f"Adapter({self.name!r}: {made_of}; {len(self.sites)} sites, {self.num_parameters:,} parameters)"


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those of the module and below, shared ones repeated: a fraction of the time of `nn.Module.parameters`."""
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _parameters(child)
