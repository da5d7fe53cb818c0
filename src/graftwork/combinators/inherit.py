"""What a combinator takes over from the method inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from graftwork.core.errors import GraftError
from graftwork.core.method import Method
from graftwork.core.site import Site


class Around(Method):
    """A method around another one, `of`: where it says nothing else it starts, learns, merges and counts as that does, and sits
    where that would.

    A subclass is a dataclass with the field `of`.  meets_needs: it hands the moments of the loop on, so that the method inside may have
    `needs`; otherwise such a one is a GraftError.
    """

    of: Method
    meets_needs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        inherit(self, self.of)
        if self.of.needs and not self.meets_needs:
            asked, found = f"{type(self).__name__}(of={self.of})", f"it needs {' and '.join(self.of.needs)} of its own"
            raise GraftError(asked, found, "choose a method inside without")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """As the method inside."""
        return self.of.identity

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """As the method inside."""
        return self.of.mergeable

    @property
    def lr(self) -> float:  # type: ignore[override]
        """As the method inside."""
        return self.of.lr

    def count(self, site: Site) -> int:
        return self.of.count(site)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.of.count_shared(sites)


def inherit(method: Method, of: Method) -> None:
    """Where a combinator names no sites, it sits where the method inside would."""
    if not method.at:
        object.__setattr__(method, "at", of.at)
        if method.layers is None:
            object.__setattr__(method, "layers", of.layers)
