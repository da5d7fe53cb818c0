"""Adapters on disk: adapter.safetensors + adapter.json + README.md in one folder."""

from __future__ import annotations

from .load import load
from .save import save

__all__ = ["load", "save"]
