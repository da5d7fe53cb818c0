"""What an adapter's files hold, and whether they will load: everything is said, nothing is raised."""

from __future__ import annotations

from .check import check
from .report import Report

__all__ = ["Report", "check"]
