"""A method: the recipe that builds deltas. A frozen dataclass of hyper-parameters that registers itself under its on-disk name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from . import fields
from .errors import GraftError, nearest
from .site import Site

if TYPE_CHECKING:
    from .adapter import Part
    from .delta import Delta

REGISTRY: dict[str, type[Method]] = {}
PRESETS: dict[str, Callable[..., Sequence[Method]]] = {}


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass has hyper-parameters, `build`, `count`, and says what it is by the class variables.

    identity: the grafted model computes exactly what the backbone does before any training.
    mergeable: the delta can be written into the backbone's weights.
    needs: what must be called around training: "step" (a schedule), "calibrate" (data before training), "begin" (every training pass),
        "again" (a term of the loss compares two passes over one batch), "apart" (its auxiliary loss has an optimiser step of its own).
    mixes: it mixes other adapters where these act: its deltas are `Mixer`s, and its options say `of` which (the texts of expressions)
        and whether they are trained with it (`joint`).
    trains: its deltas have parameters.
    replaces: its deltas hold values that stand in the place of the module's own (a head): these are one task's, and are not mixed.
    mixes_tasks: it learns something for each of its `tasks`, and the rows of one batch may have different ones.
    layered: its sites stand in layers, among which `layers` chooses.
    sized_by: the hyper-parameters that a budget of parameters decides, in proportion where they are several; () where it is the first
        number that `count` depends on.
    lr: the highest learning rate of AdamW where nobody gives one, on a backbone that is at most 384 wide (`gw.Adapter.groups`).
    """

    name: ClassVar[str] = ""
    identity: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    mixes: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    replaces: ClassVar[bool] = False
    mixes_tasks: ClassVar[bool] = False
    layered: ClassVar[bool] = True
    sized_by: ClassVar[tuple[str, ...]] = ()
    lr: ClassVar[float] = 2e-3

    at: str = dataclasses.field(default="", kw_only=True)
    layers: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        fields.check(self)

    def build(self, site: Site, part: Part) -> Delta | None:
        """The delta of one site, or None where there is nothing to do. `part` is the adapter's share of this method."""
        raise NotImplementedError(f"{type(self).__name__}.build")

    def count(self, site: Site) -> int:
        """Trainable parameters at one site, in closed form."""
        raise NotImplementedError(f"{type(self).__name__}.count")

    def count_shared(self, sites: Sequence[Site]) -> int:
        """Trainable parameters shared by all sites, in closed form."""
        return 0

    def rate(self, tensor: str) -> float:
        """The learning rate of a parameter, by its name in the delta or among the shared ones, as a multiple of the adapter's."""
        return 1.0

    def rate_of(self, role: str) -> float:
        """The learning rate of a role (`Delta.role`), as a multiple of what `rate` says of its tensors."""
        return 1.0

    def reads(self, site: Site) -> int:
        """Width of what a delta reads at a site: the input of a single weight, otherwise the sub-layer's states."""
        return site.d if site.width is not None else site.weight.d_in

    def begin(self, part: Part) -> None:
        """A moment of training: a pass of the model begins, in training mode and with gradients, and is not compiled."""

    def compare(self, part: Part, one: Tensor, other: Tensor) -> Tensor:
        """A term of the loss: how far apart the logits [.., classes] of two training passes over one batch are."""
        raise NotImplementedError(f"{type(self).__name__}.compare")

    def step(self, part: Part, progress: float) -> None:
        """A moment of the schedule: after the optimiser's step, gradients still there. progress in [0, 1]."""

    def calibrating(self, part: Part) -> None:
        """Called before a pass over the calibration batches."""

    def observe(self, part: Part, loss: Tensor) -> None:
        """Called between the forward and the backward pass of each calibration batch."""

    def calibrate(self, part: Part) -> None:
        """Called after the backward pass of each calibration batch, gradients still there."""

    def calibrated(self, part: Part) -> bool | None:
        """Called after a pass over all calibration batches; True asks for another pass."""

    def fold(self, part: Part) -> tuple[Method, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The stored form: a method, its tensors per site key, and the shared ones. By default what is trained."""
        tensors = {key: dict(delta.state_dict()) for key, delta in part.deltas.items()}
        return self, tensors, dict(part.shared_modules.state_dict())

    def __str__(self) -> str:
        given = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                given.append(f"{f.name}={_spoken(value)}")
        return f"{self.name}({', '.join(given)})"

    def to_json(self) -> dict[str, Any]:
        """Every hyper-parameter, ready for `from_json`."""
        out: dict[str, Any] = {"method": self.name}
        for f in dataclasses.fields(self):
            out[f.name] = _stored(getattr(self, f.name))
        return out


def _spoken(value: Any) -> str:
    if isinstance(value, tuple) and any(isinstance(v, Method) for v in value):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if isinstance(value, Method) else repr(value)


def _stored(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_stored(v) for v in value]
    if isinstance(value, Method):
        return value.to_json()
    return "<callable>" if callable(value) else value  # the sites themselves are stored beside it


M = TypeVar("M", bound=type[Method])


def method(name: str) -> Callable[[M], M]:
    """Register a dataclass of hyper-parameters under its on-disk name. A name twice is an error, not a warning."""

    def register(cls: M) -> M:
        _check_new(name)
        cls.name = name
        cls.__init__ = _explaining(cls.__init__, [f.name for f in dataclasses.fields(cls)])  # type: ignore[method-assign]
        REGISTRY[name] = cls
        return cls

    return register


P = TypeVar("P", bound=Callable[..., Sequence[Method]])


def preset(name: str) -> Callable[[P], P]:
    """Register a function that returns a list of methods: a published recipe under its own name.

    Every preset also takes `at`, the sites of its first method, and `layers`, the blocks of all its methods that stand in blocks.
    """

    def register(make: P) -> P:
        _check_new(name)

        @functools.wraps(make)
        def placed(*args: Any, at: str | None = None, layers: str | None = None, **given: Any) -> list[Method]:
            made = list(make(*args, **given))
            if at is not None:
                made[0] = dataclasses.replace(made[0], at=at)
            if layers is None:
                return made
            return [dataclasses.replace(m, layers=layers) if m.layered else m for m in made]

        explaining = _explaining(placed, [*inspect.signature(make).parameters, "at", "layers"])
        PRESETS[name] = explaining
        return explaining  # type: ignore[return-value,no-any-return]

    return register


def _check_new(name: str) -> None:
    if name in REGISTRY or name in PRESETS:
        raise GraftError(
            f"register {name!r}", f"{REGISTRY.get(name) or PRESETS[name]} has the name", "choose another name"
        )
    if not name.isidentifier():
        raise GraftError(
            f"register {name!r}", "not a word", "use letters, digits and _: the name stands in the text form"
        )


def _explaining(call: Callable[..., Any], known: list[str]) -> Any:
    """The same callable, whose unknown keywords are refused with the nearest known one."""

    @functools.wraps(call)
    def checked(*args: Any, **given: Any) -> Any:
        owner = type(args[0]).__name__ if call.__name__ == "__init__" else call.__name__
        for word in given:
            if word not in known:
                raise GraftError(
                    f"{owner}({word}={given[word]!r})",
                    f"no hyper-parameter {word!r}{nearest(word, known)}",
                    f"it has {', '.join(known)}",
                )
        return call(*args, **given)

    return checked


def get(name: str) -> Callable[..., Method | Sequence[Method]]:
    """The method class or preset of this name."""
    word = name.replace("-", "_")  # papers write hyphens
    found = REGISTRY.get(word) or PRESETS.get(word)
    if found is None:
        known = sorted([*REGISTRY, *PRESETS])
        raise GraftError(f"the method {name!r}", f"unknown{nearest(name, known)}", f"choose one of {', '.join(known)}")
    return found


def system(name: str, **options: Any) -> Method | Sequence[Method]:
    """A published system by its name, as papers and the catalogue write it: gw.system("llama-adapter", length=10).

    Raises GraftError for an unknown name or option.
    """
    return get(name)(**options)


def methods(pattern: str = "*", *, mergeable: bool | None = None, identity: bool | None = None) -> list[str]:
    """Names of the registered methods and presets that match a glob; the flags choose among the methods.

    A preset has a flag if all its methods have it at their defaults.
    """
    flags = {name: value for name, value in {"mergeable": mergeable, "identity": identity}.items() if value is not None}
    chosen = []
    for name in sorted([*REGISTRY, *PRESETS]):
        if fnmatch(name, pattern):
            made = flatten(get(name)())
            if all(all(getattr(m, flag) for m in made) == value for flag, value in flags.items()):
                chosen.append(name)
    return chosen


def from_json(data: Mapping[str, Any]) -> Method:
    """The method that `to_json` wrote. Names come from the registry only; nothing else is looked up or run."""
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
        raise GraftError("read a method", f"{data!r}", "expected an object with the key 'method'")
    given = {k: v for k, v in data.items() if k != "method"}
    for key, value in given.items():
        if isinstance(value, Mapping) and "method" in value:
            given[key] = from_json(value)
        elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
            given[key] = [from_json(v) for v in value]
    made = get(data["method"])(**given)
    if not isinstance(made, Method):
        raise GraftError(
            f"read the method {data['method']!r}", "it is a preset", "files hold the methods a preset is made of"
        )
    return made


def flatten(given: Method | Sequence[Any]) -> tuple[Method, ...]:
    """One method, or nested lists of methods and presets, as a flat tuple."""
    if isinstance(given, Method):
        return (given,)
    if isinstance(given, str):
        from .text import parse_methods

        return parse_methods(given)
    if isinstance(given, Sequence):
        return tuple(m for item in given for m in flatten(item))
    raise GraftError(
        "the methods of an adapter", f"{given!r}", "give a method, a list of methods, or a text such as 'lora(r=8)'"
    )
