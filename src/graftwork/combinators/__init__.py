"""Combinators: methods that take methods, one file each; importing the package registers them."""

from __future__ import annotations

import importlib
import pkgutil

for _found in pkgutil.walk_packages(__path__, __name__ + "."):
    importlib.import_module(_found.name)
