"""All base methods: importing this package registers them. `gw.methods("*lora*")`, a call of the package itself, lists them."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Any

from graftwork.core.method import methods


class _Listing(ModuleType):
    """The package and the public verb share a name: calling the module calls the verb."""

    def __call__(self, *args: Any, **flags: Any) -> list[str]:
        return methods(*args, **flags)


for _found in pkgutil.walk_packages(__path__, __name__ + "."):
    importlib.import_module(_found.name)
sys.modules[__name__].__class__ = _Listing
