"""Generated adapters: one small hypernetwork per tower writes the adapters of all its layers, for each task.

Karimi Mahabadi et al. 2021, "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks",
arXiv 2106.04489 (HyperFormer, HyperFormer++) and rabeehk/hyperformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftwork.core.adapter import Part
from graftwork.core.delta import Delta, WeightDelta
from graftwork.core.errors import GraftError
from graftwork.core.fields import flag, inner, number, positive, words
from graftwork.core.method import Method, flatten, get, method, preset
from graftwork.core.site import Site

from .hypernetwork import Controller, GeneratedDelta, GeneratedWeight, Tasks
from .inherit import Around
from .substituted import template


@method("generated")
@dataclass(frozen=True)
class Generated(Around):
    """P = view(G_P I + g_P) for every tensor P of the method inside;  I = LN(W_b relu(W_a [z_task ; e_layer ;
    p_position] + b_a) + b_b).

    of: the method inside; a bottleneck with norm="after" is HyperFormer's: h + gamma norm(U g(D h + b_D) + b_U) + beta.
    tasks: names; the batch's one is given by gw.context(model, task="mnli") (not needed where there is one task only).
    positions: HyperFormer++: one set of generators G per tower, told apart by p (attention or feed-forward); else one
        set for each.
    task_dim: t, of z, e and p, all N(0, 1);  hidden: of W_a;  proj: k, of I.  G, W_a, W_b N(0, init_std^2), their
        biases 0.
    One controller per tower (encoder, decoder), with its own e and p; z is shared by all.  `materialise` gives a
    task's plain adapter.
    Parameters per tower: L t + 2 t + (3 t hidden + hidden) + (hidden k + k) + 2 k + (k + 1) times the generated ones;
    tasks * t in all.
    When: many tasks, languages or layers shall share what they have in common: one network makes all adapters.
    """

    of: Method = inner("bottleneck")
    tasks: tuple[str, ...] = words(("default",))
    task_dim: int = positive(64)
    hidden: int = positive(128)
    proj: int = positive(64)
    positions: bool = flag(True)
    init_std: float = number(0.01, low=0.0)

    identity = mergeable = False
    lr = 3e-4  # of the paper; a step moves what is written by the sum over proj inputs

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise GraftError(f"Generated(tasks={self.tasks!r})", "no task, or one twice", "name each task once")

    def build(self, site: Site, part: Part) -> Delta | None:
        inside = template(self, self.of, site, part)
        if inside is None:
            return None
        like = site.like
        tasks = part.shared("tasks", lambda: Tasks(self, like))
        layers, places = places_of([s for s in part.sites if s.tower == site.tower])
        tower = part.shared(f"tower {site.tower}", lambda: Controller(self, len(layers), len(places), like))
        position = places.index(site.role)
        kind = tower.add("" if self.positions else site.role, inside, like)
        made = GeneratedWeight() if isinstance(inside, WeightDelta) else GeneratedDelta()
        made.setup(self.tasks, inside, tasks, tower, kind, (layers.index(site.layer), position))
        return made

    def count(self, site: Site) -> int:
        return 0

    def count_shared(self, sites: Sequence[Site]) -> int:
        t, k, total = self.task_dim, self.proj, len(self.tasks) * self.task_dim
        for tower in dict.fromkeys(s.tower for s in sites):
            inside = [s for s in sites if s.tower == tower]
            layers, places = places_of(inside)
            total += len(layers) * t + (len(places) * t if self.positions else 0)
            total += (3 if self.positions else 2) * t * self.hidden + self.hidden + self.hidden * k + k + 2 * k
            sets = {("" if self.positions else s.role, s.d, self.of.count(s)) for s in inside}
            total += sum((k + 1) * numbers for _, _, numbers in sets)
        return total


def places_of(sites: Sequence[Site]) -> tuple[list[int | None], list[str]]:
    """The layers and the roles among a tower's sites, in order."""
    layers = sorted({s.layer for s in sites}, key=lambda layer: -1 if layer is None else layer)
    return layers, sorted({s.role for s in sites})


@preset("hyperformer")
def HyperFormer(
    tasks: tuple[str, ...] = ("default",), reduction: int = 32, positions: bool = True, norms: bool = True
) -> list[Method]:
    """HyperFormer++ (positions=False: HyperFormer): generated bottlenecks after self-attention and feed-forward;
    layer norms trained.

    Training: each batch holds one task, drawn by `temperature`; lr 3e-4, label smoothing 0.1.  Source: sections 2.3
        and 3.
    When: several tasks are trained at once and shall help each other.
    """
    (of,) = flatten(get("bottleneck")(reduction=reduction, act="gelu_new", norm="after", at="self.attn, mlp"))
    generated = Generated(of=of, tasks=tuple(tasks), positions=positions)
    return [generated, *flatten(get("full")(at="norm"))] if norms else [generated]


def temperature(sizes: Mapping[str, int] | Sequence[int], t: float = 10.0) -> list[float]:
    """How often each task is drawn: p ~ n^(1/t), n the tasks' numbers of examples. t = 1 by size, t = infinity
    evenly."""
    numbers = list(sizes.values()) if isinstance(sizes, Mapping) else list(sizes)
    if not numbers or min(numbers) < 1 or t <= 0:
        raise GraftError(
            f"temperature({sizes!r}, t={t})", "no task, an empty one, or t <= 0", "give sizes >= 1 and t > 0"
        )
    weights = [n ** (1 / t) for n in numbers]
    return [w / sum(weights) for w in weights]
