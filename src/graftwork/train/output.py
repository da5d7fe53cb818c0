"""The folder a job writes to, looked at before the job, and what its errors mean."""

from __future__ import annotations

import errno
import resource
import sys
import tempfile
from pathlib import Path

import torch

from ..core.errors import GraftError
from .checkpoints import FOLDER
from .settings import TrainSettings

STATUS = Path("/proc/self/status")


def check_folder(out: Path, settings: TrainSettings) -> None:
    """GraftError where `out` cannot be written, or holds what must not be lost. Changes nothing."""
    if out.exists() and not out.is_dir():
        raise GraftError(f"write to {str(out)!r}", "a file", "give a folder")
    above = out
    while not above.exists():
        above = above.parent
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise GraftError(
            f"write to {str(out)!r}", f"{error.strerror} in {str(above)!r}", "give a folder that can be written"
        ) from error
    if settings.overwrite or not out.is_dir():
        return
    if (out / "adapter.json").exists():
        raise GraftError(f"write to {str(out)!r}", "a finished adapter", "give another --out, or --overwrite")
    if (out / FOLDER).exists() and not settings.resume:
        raise GraftError(
            f"write to {str(out)!r}", "an interrupted run", "go on with --resume, or start again with --overwrite"
        )
    foreign = sorted(p.name for p in out.iterdir() if p.name != FOLDER)
    if foreign:
        raise GraftError(
            f"write to {str(out)!r}", f"a folder with {', '.join(foreign[:3])}", "give a new or empty folder"
        )


def storage_error(out: Path, error: OSError | RuntimeError) -> GraftError:
    """What an error of the file system means. Anything else is raised as it is."""
    asked, do = f"write to {str(out)!r}", "make room there, then go on with --resume; or write elsewhere"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return GraftError(asked, "the disk is full" if full else str(error.strerror or error), do)
    if "PytorchStreamWriter" in str(error) or "file write failed" in str(error):  # how torch.save says it
        return GraftError(asked, "the disk refused to take more", do)
    raise error


def memory_peak() -> int:
    """Most bytes ever held: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if STATUS.is_file():  # Linux hands the peak of the process that started this one on to getrusage
        peaks = [line.split() for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0][1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
