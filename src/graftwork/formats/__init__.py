"""Adapters in any format: graftwork's own, and those of other libraries. A format is one object; see `format.py`."""

from __future__ import annotations

from .plain import Refactored, plain_lora
from .registry import by_name, load, recognise, save, write

__all__ = ["Refactored", "by_name", "load", "plain_lora", "recognise", "save", "write"]
