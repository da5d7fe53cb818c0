"""Which runs are missing, which learning rate is taken, and what the rows say in the end."""

from __future__ import annotations

import csv
import io
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from graftwork.bench.chosen import Entry, Task
from graftwork.bench.report import report
from graftwork.bench.runs import DONE, FAILED, RUNNING, Row, best_rate, expected, final, missing, tune
from graftwork.bench.settings import BenchSettings
from graftwork.bench.suites import Source
from graftwork.bench.summary import cells, mean_rank, ranks
from graftwork.bench.tables import lines, markdown
from graftwork.bench.tasks import Rows
from graftwork.bench.work import Plan
from graftwork.core.errors import GraftError

SETTINGS = BenchSettings("b", "out", tasks="one,two", seeds=3, lrs="1e-3,1e-2")
TASKS = [Task(Rows(Source(name, name), Path(name)), "b", "accuracy", True, 10_000, 50) for name in ("one", "two")]
LORA, IA3 = (Entry("one", name, f"{name}()", 40) for name in ("lora", "ia3"))


def done(run, score: float, **more) -> Row:
    cost = {"seconds": 2.0, "cpu": 1.0, "memory": 2**20, "bytes": 1000, "trained": 50, "device": "cpu"}
    return Row(run, DONE, {"score": score, "scores": {"accuracy": score}, **cost, **more})


def test_first_the_learning_rates_then_the_seeds() -> None:
    first = missing(TASKS, [LORA], SETTINGS, [])
    assert [(r.phase, r.lr, r.seed) for r in first] == [("tune", 1e-3, 0), ("tune", 1e-2, 0)]
    half = [done(first[0], 0.5), Row(first[1], RUNNING)]
    assert missing(TASKS, [LORA], SETTINGS, half) == []
    over = [done(first[0], 0.5), done(first[1], 0.6)]
    finals = missing(TASKS, [LORA], SETTINGS, over)
    assert [(r.phase, r.lr, r.seed) for r in finals] == [("final", 1e-2, seed) for seed in range(3)]
    assert missing(TASKS, [LORA], SETTINGS, [*over, *(done(r, 0.7) for r in finals)]) == []
    assert len(first) + len(finals) == expected([LORA], SETTINGS)


def test_one_learning_rate_is_not_tuned() -> None:
    alone = replace(SETTINGS, lrs="2e-3")
    assert [(r.phase, r.lr) for r in missing(TASKS, [LORA], alone, [])] == [("final", 2e-3)] * 3


def test_more_seeds_later_add_what_is_missing() -> None:
    over = [done(r, 0.5) for r in (*tune(LORA, SETTINGS), *final(LORA, SETTINGS, 1e-3))]
    assert [r.seed for r in missing(TASKS, [LORA], replace(SETTINGS, seeds=5), over)] == [3, 4]


def test_the_best_rate_is_the_one_that_did_best_and_did_not_fail() -> None:
    low, high = tune(LORA, SETTINGS)
    assert best_rate([done(low, 0.5), done(high, 0.6)], SETTINGS, larger=True) == 1e-2
    assert best_rate([done(low, 0.5), done(high, 0.6)], SETTINGS, larger=False) == 1e-3
    assert best_rate([done(low, 0.5), Row(high, FAILED, {"reason": "diverged"})], SETTINGS, larger=True) == 1e-3
    assert best_rate([done(low, 0.5), done(high, 0.5)], SETTINGS, larger=True) == 1e-3  # of equals the smaller one
    lost = [Row(run, FAILED, {"reason": "diverged"}) for run in (low, high)]
    assert best_rate(lost, SETTINGS, larger=True) is None
    assert missing(TASKS, [LORA], SETTINGS, lost) == []


def test_the_interval_is_students() -> None:
    rows = [done(r, s) for r, s in zip(final(LORA, SETTINGS, 1e-3), (0.70, 0.72, 0.77), strict=True)]
    cell = cells([LORA], rows)["one", "lora"]
    # s = 0.0360555, t(0.975, 2) = 4.302653
    assert cell.mean == pytest.approx(0.73) and cell.half == pytest.approx(
        4.302653 * 0.0360555 / math.sqrt(3), rel=1e-5
    )
    assert cells([LORA], rows[:1])["one", "lora"].half is None
    assert math.isnan(cells([LORA], [])["one", "lora"].mean)


def test_time_is_the_processors_without_an_accelerator() -> None:
    run = final(LORA, SETTINGS, 1e-3)[0]
    assert cells([LORA], [done(run, 0.5)])["one", "lora"].time == 1.0
    assert cells([LORA], [done(run, 0.5, device="cuda")])["one", "lora"].time == 2.0


def everything() -> tuple[list[Entry], list[Row]]:
    """lora does best on one, ia3 fails there; both do the same on two; vera is left out of two."""
    entries = [LORA, IA3, Entry("one", "vera", "vera(r=3)", 40), Entry("two", "lora", "lora(r=1)", 41)]
    entries += [Entry("two", "ia3", "ia3()", 30), Entry("two", "vera", reason="its smallest setting has 60")]
    scores = {("one", "lora"): 0.9, ("one", "vera"): 0.8, ("two", "lora"): 0.7, ("two", "ia3"): 0.7}
    rows = []
    for entry in entries:
        if entry.reason:
            continue
        score = scores.get((entry.task, entry.label))
        for run in final(entry, SETTINGS, 1e-3):
            failed = Row(run, FAILED, {"reason": "diverged: the loss is <nan> at step 3"})
            rows.append(failed if score is None else done(run, score))
    return entries, rows


def test_ranks() -> None:
    entries, rows = everything()
    found = ranks(TASKS, cells(entries, rows))
    assert found == {"lora": {"one": 1, "two": 1.5}, "ia3": {"one": 3, "two": 1.5}, "vera": {"one": 2}}
    assert mean_rank(found["lora"]) == 1.25 and mean_rank(found["vera"]) == 2  # over what it takes part in


def test_a_method_that_failed_with_a_seed_is_ranked_last() -> None:
    entries, rows = everything()
    last = next(i for i, row in enumerate(rows) if (row.run.label, row.run.task, row.run.seed) == ("lora", "one", 2))
    rows[last] = Row(rows[last].run, FAILED, {"reason": "out of memory"})
    found = cells(entries, rows)
    assert ranks(TASKS, found)["lora"]["one"] == 2.5 and ranks(TASKS, found)["vera"]["one"] == 1
    assert "0.9000 ± 0.0000 of 2 of 3 seeds (2.5)" in markdown(Plan(SETTINGS, tuple(TASKS), tuple(entries)), found)


def test_the_report_holds_scores_failures_and_what_was_left_out(tmp_path: Path) -> None:
    entries, rows = everything()
    page = report(Plan(SETTINGS, tuple(TASKS), tuple(entries)), rows, tmp_path).read_text()
    assert "0.9000 ± 0.0000" in page and "its smallest setting has 60" in page
    assert page.count("diverged: the loss is &lt;nan&gt; at step 3") == 3 and "<nan>" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "").replace("http://purl.org/", "").replace(
        "http://creativecommons.org/", ""
    )  # nothing is loaded from elsewhere
    pictures = page.split("<svg")[1:]
    assert len(pictures) == 2
    picture = ElementTree.fromstring("<svg" + pictures[0].split("</svg>")[0] + "</svg>")
    titles = [t.text for t in picture.iter() if t.tag.endswith("title") and t.text and "lora" in t.text]
    assert titles == ["lora: accuracy 0.9000 ± 0.000, 40 parameters"] * 3  # one in each of the three panels
    of = (tmp_path / "methods" / "ia3.html").read_text()
    assert "0.7000" in of and "diverged" in of and "lr" in of
    assert (tmp_path / "pictures" / "one.svg").read_text() in page and (tmp_path / "pictures" / "two.svg").is_file()


def test_the_tables_and_the_runs_as_text() -> None:
    entries, rows = everything()
    text = markdown(Plan(SETTINGS, tuple(TASKS), tuple(entries)), cells(entries, rows))
    assert "| `vera` | 2.0 | 0.8000 ± 0.0000 (2) | left out |" in text
    assert "| `lora` | `lora(r=1)` | 0.7000 ± 0.0000 | 41 | 0.001 | 2.0 | 1.0 | 1 | 1 |" in text
    assert "| two | `vera` | its smallest setting has 60 |" in text
    assert text.count("| one | `ia3` | lr 0.001, seed") == 3
    found = list(csv.DictReader(io.StringIO(lines([*rows, Row(tune(LORA, SETTINGS)[0], RUNNING)]))))
    assert len(found) == len(rows)  # what is not over is not there
    assert [found[0][name] for name in ("task", "label", "phase", "lr", "seed", "state", "score", "memory")] == (
        ["one", "lora", "final", "0.001", "0", "done", "0.9", str(2**20)]
    )
    assert [r["reason"] for r in found if r["state"] == FAILED] == ["diverged: the loss is <nan> at step 3"] * 3


def test_published_numbers_stand_beside_ours_with_their_source(tmp_path: Path) -> None:
    settings = replace(SETTINGS, suite="glue", tasks="cola")
    task = replace(TASKS[0], rows=Rows(Source("cola", "cola", "matthews"), Path("cola")), metric="matthews")
    page = report(Plan(settings, (task,), (Entry("cola", "lora", "lora()", 40),)), [], tmp_path).read_text()
    assert "63.4" in page and "arXiv 2106.09685, table 2" in page and "roberta-large" in page


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"lrs": "a,b"}, "--lrs"),
        ({"lrs": "x1,2e-3"}, "numbers and multiples"),
        ({"lrs": "x0,x1"}, "--lrs"),
        ({"lrs": "0"}, "--lrs"),
        ({"seeds": 0}, "--seeds"),
        ({"tasks": None}, "neither --tasks nor --suite"),
        ({"workers": 0}, "--workers"),
    ],
)
def test_wrong_settings_are_refused(given: dict, found: str) -> None:
    with pytest.raises(GraftError, match=found):
        replace(SETTINGS, **given)


def test_learning_rates_may_be_multiples_of_the_methods_own() -> None:
    relative = replace(SETTINGS, lrs="x0.25,x1, x4")
    assert relative.relative and relative.rates() == (0.25, 1.0, 4.0) and relative.rate(0.25) == "x0.25"
    assert not SETTINGS.relative and SETTINGS.rate(1e-3) == "0.001"
    assert BenchSettings("b", "out", tasks="one").relative
