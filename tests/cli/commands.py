"""Running a command as a person would."""

from __future__ import annotations

import pytest

from graftwork.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Its exit code, and what it said on both streams."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err
