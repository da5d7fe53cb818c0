"""Solving a method's size for a budget of parameters, from its closed `count`.

What is solved is the hyper-parameter that the method names (`Method.sized_by`) or, of a method that names none, the first number
that its count depends on. A list of methods shares the budget: the first size of each member is scaled by one common factor. Where
even the smallest such setting is above the budget, every number that the count depends on is scaled together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from ..core.errors import GraftError
from ..core.method import Method
from ..core.site import Site
from ..sites.anatomy import Anatomy
from ..sites.where import select

HEADS = ("head", "pooler")  # what is trained there is the task's, not the method's
STEPS = 1024  # settings between one and its double
FARTHEST = 20  # doublings or halvings of what a method has by default
REFUSED = 32  # settings that may turn out not to be buildable, one after the other

Path = tuple[str, ...]  # the names that lead to a number: ("of", "r")
Methods = tuple[Method, ...]
Builds = Callable[[Methods], None]  # raises GraftError where the methods cannot be grafted


@dataclass(frozen=True)
class Size:
    """One number that decides a count.

    member: which of the methods has it;  whole: an integer;  sign: -1 where the count falls with it;  named: the method says so
    itself;  free: None by default, which leaves the decision to another number.
    """

    member: int
    path: Path
    base: float
    whole: bool
    sign: int = 1
    named: bool = False
    free: bool = False

    def at(self, factor: float) -> float:
        """Its value where the count is to grow by about `factor`."""
        value = self.base * factor**self.sign
        return max(1, round(value)) if self.whole else float(f"{value:.3g}")


@dataclass(frozen=True)
class Solved:
    """The methods at the size that fits, and how many parameters they train beside the head."""

    methods: Methods
    count: int

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods))


def share(budget: str) -> float | int | None:
    """A budget as text: "0.5%" of the backbone is 0.005, "100000" parameters, "none" is None. GraftError for anything else."""
    text = budget.strip().lower().replace("_", "").replace(",", "")
    if text == "none":
        return None
    try:
        value = float(text.removesuffix("%")) / 100 if text.endswith("%") else int(float(text))
    except (ValueError, OverflowError):
        value = 0
    if not 0 < value < math.inf or (text.endswith("%") and value > 1):
        do = "give a share of the backbone such as 0.5%, a number of parameters, or none"
        raise GraftError(f"the budget {budget!r}", "neither a share nor a number above 0", do)
    return value


def allowed(budget: str, backbone: int) -> int | None:
    """How many parameters a budget allows on a backbone of so many."""
    value = share(budget)
    return int(value * backbone) if isinstance(value, float) else value


def solve(methods: Methods, anatomy: Anatomy, budget: int | None, builds: Builds = lambda methods: None) -> Solved:
    """The methods at the largest size whose count is within the budget; None: as they are.

    Methods without a size stay as they are. `builds` is asked about what was found: not every rule (a block must divide a width)
    is known before a delta is made.
    GraftError where no setting fits, with the smallest count, where none can be built, and where a site is missing.
    """
    probe = _Probe(methods, anatomy)
    if budget is None:
        builds(methods)
        return Solved(methods, sum(map(_count, methods, probe.sites)))
    every = sizes(methods, probe)
    groups = [_leading(every), [s for s in every if not s.free]]
    smallest: list[int] = []
    refusal: GraftError | None = None
    for group in groups if every else [[]]:
        for _ in range(REFUSED):
            found, least = _largest(probe, group, budget)
            if found is None:
                smallest += [] if least is None else [least]
                break
            try:
                builds(found.methods)
                return found
            except GraftError as error:
                refusal = refusal or error
                probe.seen[found.methods] = None
    if refusal is not None:
        raise refusal
    if not smallest:  # nothing could be counted: the first reason is that of the methods as they are
        sum(map(_count, methods, probe.sites))
    asked = f"{' + '.join(map(str, methods))} within {budget:,} parameters"
    do = f"give a --budget of at least {min(smallest)}, or leave the method out"
    raise GraftError(asked, f"its smallest setting has {min(smallest):,}", do)


def sizes(methods: Methods, probe: _Probe) -> list[Size]:
    """The numbers that the count depends on, member by member: what a method names first, then in the order of its fields."""
    out = []
    for member, method in enumerate(methods):
        for path, value, whole, named in _numbers(method):
            size = Size(member, path, 1.0 if value is None else value, whole, named=named, free=value is None)
            sign = _sign(probe, size)
            if sign or named:
                out.append(replace(size, sign=sign or 1))
    return out


def _leading(every: Sequence[Size]) -> list[Size]:
    """Of each member what it names, or else the first that was found."""
    members = {s.member for s in every}
    out = []
    for member in sorted(members):
        of = [s for s in every if s.member == member and (len(members) == 1 or not s.free)]
        out += [s for s in of if s.named] or of[:1]
    return out


def _numbers(method: Method) -> list[tuple[Path, float | None, bool, bool]]:
    """(path, value, whether it is whole, whether it is named) of each number among the hyper-parameters; of a method inside first."""
    inside, own = [], []
    for field in fields(method):
        value, kind = getattr(method, field.name), str(field.type)
        if isinstance(value, Method):
            inside += [((field.name, *path), *rest) for path, *rest in _numbers(value)]
        elif kind.startswith(("int", "float")) and isinstance(value, int | float | None) and value != 0:
            own.append(((field.name,), value, kind.startswith("int"), field.name in method.sized_by))
    return [*inside, *sorted(own, key=lambda number: not number[3])]  # type: ignore[list-item]


def _sign(probe: _Probe, size: Size) -> int:
    """1 where the count grows with this number, -1 where it falls, 0 where it does neither."""
    found = [(f, s.count) for f in (0.5, 1.0, 2.0, 4.0) if (s := probe([size], f)) is not None]
    return (found[-1][1] > found[0][1]) - (found[-1][1] < found[0][1]) if found else 0


class _Probe:
    """What the methods count at other sizes; None where a setting is refused. Each is asked once."""

    def __init__(self, methods: Methods, anatomy: Anatomy) -> None:
        self.methods = methods
        self.sites = [[s for s in select(anatomy, m.at, m.layers) if s.role not in HEADS] for m in methods]
        self.seen: dict[Methods, Solved | None] = {}

    def __call__(self, group: Sequence[Size], factor: float) -> Solved | None:
        made = list(self.methods)
        try:
            for member in dict.fromkeys(size.member for size in group):
                made[member] = _changed(made[member], {s.path: s.at(factor) for s in group if s.member == member})
            if tuple(made) not in self.seen:
                total = sum(map(_count, made, self.sites))
                self.seen[tuple(made)] = Solved(tuple(made), total)
        except (GraftError, ValueError, ZeroDivisionError):  # a block that does not divide a width, no row left
            return None
        return self.seen[tuple(made)]


def _count(method: Method, sites: Sequence[Site]) -> int:
    return sum(map(method.count, sites)) + method.count_shared(sites) if sites else 0


def _changed(method: Method, values: dict[Path, float]) -> Method:
    """The method with other numbers, all at once: one may bound another."""
    own: dict[str, object] = {path[0]: value for path, value in values.items() if len(path) == 1}
    for name in dict.fromkeys(path[0] for path in values if len(path) > 1):
        own[name] = _changed(
            getattr(method, name), {p[1:]: v for p, v in values.items() if len(p) > 1 and p[0] == name}
        )
    return replace(method, **own)  # type: ignore[arg-type]


def _largest(probe: _Probe, group: Sequence[Size], budget: int) -> tuple[Solved | None, int | None]:
    """The largest setting within the budget, and the smallest count that was seen; None where none could be counted."""
    seen = _doubled(probe, group, budget)
    fitting = [(f, found) for f, found in seen if found.count <= budget]
    if not fitting:
        return None, min((found.count for _, found in seen), default=None)
    low, best = max(fitting, key=lambda pair: (pair[1].count, -pair[0]))
    high = 2 * low
    for _ in range(2):  # the second time between two neighbours, for numbers above STEPS
        factors = _distinct(group, low, high)
        at = _last_fitting(probe, group, factors, budget)
        low, high = factors[at], factors[min(at + 1, len(factors) - 1)]
        found = probe(group, low)
        if found is not None and best.count < found.count <= budget:
            best = found
    return best, best.count


def _doubled(probe: _Probe, group: Sequence[Size], budget: int) -> list[tuple[float, Solved]]:
    """Settings at factors that are powers of two: up to the first that are above the budget or grow no more, down to what fits."""
    out: list[tuple[float, Solved]] = []
    for step in (1, -1):
        passed, last = 0, -1
        for i in range(0 if step > 0 else -1, step * FARTHEST, step):
            found = probe(group, 2.0**i)
            if found is None:
                continue
            out.append((2.0**i, found))
            passed += found.count == last or (found.count > budget) == (step > 0)
            last = found.count
            if passed == 3:
                break
    return out


def _distinct(group: Sequence[Size], low: float, high: float) -> list[float]:
    """Factors from low to high, one for each setting that differs from the one before."""
    factors = [low * (high / low) ** (i / STEPS) for i in range(STEPS + 1)]
    settings = [tuple(size.at(f) for size in group) for f in factors]
    return [f for i, f in enumerate(factors) if i == 0 or settings[i] != settings[i - 1]]


def _last_fitting(probe: _Probe, group: Sequence[Size], factors: Sequence[float], budget: int) -> int:
    """The index of the last factor within the budget, of which the first is one. Where settings in between are refused, all are
    asked; otherwise halving is enough."""

    def fits(i: int) -> bool:
        found = probe(group, factors[i])
        return found is not None and found.count <= budget

    if any(probe(group, factors[i * (len(factors) - 1) // 8]) is None for i in range(9)):
        return max(filter(fits, range(len(factors))), default=0)
    low, high = 0, len(factors)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
