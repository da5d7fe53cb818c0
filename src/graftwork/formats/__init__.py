"""Adapters in any format: graftwork's own, and those of other libraries. A format is one object; see `format.py`."""

from __future__ import annotations

from .registry import by_name, load, recognise, save

__all__ = ["by_name", "load", "recognise", "save"]
