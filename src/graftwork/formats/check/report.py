"""What `check` tells."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

SHOWN = 4  # names in one sentence
NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)")  # of a layer, where kohya writes _ for every .


def tell(into: list[str], why: str, names: list[str]) -> None:
    """Add a sentence about these names; none where there are none."""
    if names:
        some = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        into.append(f"{len(names)} {why}: {some}")


@dataclass(frozen=True)
class Group:
    """Tensors whose names differ in numbers only, and whose shapes and dtypes are the same. name: numbers as *."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    parameters: int


@dataclass
class Said:
    """What the files say in words, for one format.

    methods: in graftwork's words or the format's;  options: those that are not off;  of: parameters of the backbone;
    problems: why it will not load here;  ignored: what the library that owns the format leaves out without an error;
    notes: what else a person should know.
    """

    methods: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    of: int | None = None
    problems: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """All that is known of a place.

    place: folder, file or address with its commit;  format: None where none is known;  backbone, model: its name and class
    as the files say them;  ranks, widths: the smaller and the larger sides of the matrices;  layers: numbers in the names
    that count blocks;  parameters, bytes: of the tensors;  share: of the backbone's parameters, where those are known;
    files: bytes by name;  pickles: files that can run code when they are opened carelessly;  finite: None where nothing
    could be read;  onto: the backbone that it was tried on.
    loads: True where it was tried and did;  False where something speaks against it;  None where nothing does.
    """

    place: str
    format: str | None = None
    backbone: str | None = None
    model: str | None = None
    said: Said = field(default_factory=Said)
    groups: list[Group] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    parameters: int = 0
    bytes: int = 0
    share: float | None = None
    dtypes: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    pickles: list[str] = field(default_factory=list)
    finite: bool | None = None
    onto: str | None = None
    loads: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields, those of `said` among them."""
        out = asdict(self)
        said = out.pop("said")
        return out | said

    def join(self, name: str, one: Report) -> None:
        """Add what is known of one adapter of a recipe, by its name."""
        self.format, self.backbone, self.model, self.share = one.format, one.backbone, one.model, None
        self.onto = one.onto
        self.groups += [replace(group, name=f"{name}/{group.name}") for group in one.groups]
        self.parameters, self.bytes = self.parameters + one.parameters, self.bytes + one.bytes
        for key in ("ranks", "widths", "layers", "dtypes"):
            setattr(self, key, sorted({*getattr(self, key), *getattr(one, key)}))
        self.files |= {f"{name}/{file}": size for file, size in one.files.items()}
        self.pickles += [f"{name}/{file}" for file in one.pickles]
        self.finite = one.finite if self.finite is not False else False
        self.loads = one.loads if self.loads is not False else False
        for key in ("methods", "problems", "ignored", "notes"):
            getattr(self.said, key).extend(f"{name}: {text}" for text in getattr(one.said, key))

    def measure(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill in what names and shapes tell."""
        groups: Counter[tuple[str, tuple[int, ...], str]] = Counter()
        for name, value in tensors.items():
            groups[NUMBER.sub("*", name), tuple(value.shape), str(value.dtype).removeprefix("torch.")] += 1
        for (name, shape, dtype), count in groups.items():
            one = next(v.numel() for n, v in tensors.items() if tuple(v.shape) == shape)
            self.groups.append(Group(name, count, shape, dtype, count * one))
        matrices = [v.shape for v in tensors.values() if v.dim() == 2]
        self.ranks, self.widths = (sorted({side(shape) for shape in matrices}) for side in (min, max))
        self.layers = sorted({int(w) for n in tensors for w in NUMBER.findall(n) if len(w) < 5})
        self.parameters = sum(v.numel() for v in tensors.values())
        self.bytes = sum(v.nbytes for v in tensors.values())
        self.dtypes = sorted({group.dtype for group in self.groups})
