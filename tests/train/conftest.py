from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory):
    """kind -> folder of a tiny random backbone, made at its first use."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny.backbone(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get
