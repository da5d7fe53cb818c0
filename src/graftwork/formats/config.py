"""A config of another library, read field by field: what nobody asked for and is not off is refused by name."""

from __future__ import annotations

from typing import Any

from ..core.errors import GraftError

OFF: tuple[Any, ...] = (None, False, {}, [], "", "none")
LARGEST, LONGEST = 2**53, 300


class Config:
    """The fields of a config. Each is taken with its type and default; `finish` refuses what was not taken."""

    def __init__(self, data: dict[str, Any], asked: str, file: str = "adapter_config.json") -> None:
        self.data, self.asked, self.file = data, asked, file
        self.warnings: list[str] = []
        self._taken: set[str] = set()

    def take(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The field's value. GraftError for another type; null is the default."""
        self._taken.add(name)
        value = self.data.get(name)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            raise self.error(f"{name!r} is {value!r}", f"expected {wanted}: restore the file")
        return self.sane(name, value)

    def sane(self, name: str, value: Any) -> Any:
        """The value. GraftError for a number that is not finite, or a whole one beyond what a float can tell apart."""
        if isinstance(value, int | float) and not abs(value) <= LARGEST:  # the words for NaN and infinity too
            raise self.error(f"{name!r} is {value!r}", "no such number has a meaning here: restore the file")
        return value

    def names(self, name: str) -> list[str]:
        """A field that is a list of texts, or one text."""
        value = self.take(name, (list, str), [])
        listed = [value] if isinstance(value, str) else value
        if not all(isinstance(v, str) for v in listed):
            raise self.error(f"{name!r} is {value!r}", "expected names: restore the file")
        return listed

    def inert(self, *names: str) -> None:
        """Fields that change nothing in what a trained adapter computes."""
        self._taken.update(names)

    def finish(self) -> None:
        """GraftError for a field that nobody took, unless it is off."""
        for name, value in self.data.items():
            if name not in self._taken and value not in OFF:
                raise self.error(
                    f"{name} = {value!r}", "this option is not supported; the adapter would compute something else"
                )

    def error(self, found: str, do: str) -> GraftError:
        """The error that reading this config ends in."""
        short = found if len(found) <= LONGEST else f"{found[:LONGEST]} ..."
        return GraftError(f"{self.asked}: {self.file}", short, do)
