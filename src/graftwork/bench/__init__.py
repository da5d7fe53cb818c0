"""One bench: every method on the same backbone and data, with the same tuning effort and the same budget of parameters.

    from graftwork.bench import BenchSettings, bench
    bench(BenchSettings(backbone="roberta-base", out="bench", tasks="sst2,subj,digits", methods="all"))

Everything heavy is imported when it is first used, so that the command line can read the settings at no cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .settings import BenchSettings

if TYPE_CHECKING:
    from .work import bench

__all__ = ["BenchSettings", "bench"]


def __getattr__(name: str) -> Any:
    if name == "bench":
        from .work import bench

        return bench
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
