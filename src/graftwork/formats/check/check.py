"""Looking at the files of an adapter without a backbone, and trying them on one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ...core.errors import GraftError
from ...grafting.graft import activate, active, adapters, remove
from ...grafting.install import base_parameters
from ...store.atomic import DESCRIPTION
from ...store.finite import finite
from ...store.hub import locate
from ...store.read import PICKLES
from ...store.recipe import Recipe, load_recipe, recipe_in
from ..files import tensors_of
from ..registry import OWN, load, recognise
from . import adapterhub, own, peft
from .report import Report, Said, tell

Tensors = Mapping[str, Tensor]
# what the files of a format say, in words; and which of them hold its tensors: of each group the first that is there
DESCRIBED: dict[str, Callable[[Path, Tensors], Said]] = {
    OWN: own.said,
    "peft": peft.said,
    "adapterhub": adapterhub.said,
}
FILES = {OWN: own.FILES, "peft": peft.FILES, "adapterhub": adapterhub.FILES}


def check(where: str | Path, model: nn.Module | None = None) -> Report:
    """What the adapter in this folder, file or hub address holds, for which backbone, whether it will load, what it costs.

    model: try it on this backbone too, which is afterwards as it was.
    Nothing is raised for what is wrong with the files: it is among the report's problems.
    """
    report = Report(str(where))
    try:
        place = locate(where)
    except GraftError as error:
        return _failed(report, error)
    report.place = str(place.origin or where)
    if not place.path.exists():
        return _failed(report, GraftError("", "no such folder or file", "look at the path"))
    try:
        recipe = recipe_in(place.path)
    except GraftError as error:
        return _failed(report, error)
    if recipe is not None:
        return _recipe(report, recipe, model)
    _look(report, place.path)
    if model is not None:
        _try(report, place.path, model)
    if report.said.problems:
        report.loads = False
    return report


def _failed(report: Report, error: GraftError) -> Report:
    report.said.problems.append(error.found)
    report.loads = False
    return report


def _recipe(report: Report, recipe: Recipe, model: nn.Module | None) -> Report:
    """What its adapters hold together, and what is wrong with each; and on a backbone, whether they act together."""
    report.said.notes.append(f"a recipe: {recipe.expression}")
    for name in recipe.names:
        report.join(name, check(recipe.folder / name, model))
    report.files |= {p.name: p.stat().st_size for p in recipe.folder.iterdir() if p.is_file()}
    if model is not None and report.loads:
        before, there = active(model), set(adapters(model))
        try:
            load_recipe(model, recipe, "check")
        except GraftError as error:
            return _failed(report, error)
        activate(model, before)
        for name in set(adapters(model)) - there:
            remove(model, name)
    return report


def _look(report: Report, path: Path) -> None:
    """Everything that the files tell by themselves."""
    problems = report.said.problems
    try:
        files = sorted(p for p in ([path] if path.is_file() else path.iterdir()) if p.is_file())
        report.files = {p.name: p.stat().st_size for p in files}
        form = recognise(path)
        report.format = form.name if form is not None else OWN if (path / DESCRIPTION).is_file() else None
    except (OSError, GraftError) as error:
        problems.append(str(error))
        return
    report.pickles = [name for name in report.files if Path(name).suffix.lower() in PICKLES]
    tensors = _tensors(report, files)
    report.measure(tensors)
    if report.format is None:
        problems.append("no adapter of a format that graftwork knows")
        return
    try:
        before, report.said = report.said, DESCRIBED.get(report.format, _nothing)(path, tensors)
        report.said.problems[:0] = before.problems
    except GraftError as error:
        problems.append(error.found)
    with contextlib.suppress(GraftError):  # what is wrong with the config is said already
        report.backbone, report.model = own.backbone(path) if form is None else form.backbone(path)
    if report.said.of:
        report.share = report.parameters / report.said.of


def _nothing(path: Path, tensors: Tensors) -> Said:
    return Said()


def _tensors(report: Report, files: list[Path]) -> dict[str, Tensor]:
    """The tensors of the format's files, pickles by torch.load(weights_only=True); of every file where none is known."""
    by_name = {p.name: p for p in files}
    if report.format in FILES:
        there = ([by_name[name] for name in group if name in by_name] for group in FILES[report.format])
        chosen = [paths[0] for paths in there if paths]
    else:
        chosen = [p for p in files if p.suffix == ".safetensors" or p.suffix in PICKLES]
    found: dict[str, Tensor] = {}
    for path in chosen:
        try:
            found |= tensors_of(path)
        except GraftError as error:
            report.said.problems.append(f"{path.name}: {error.found}")
    wild = [name for name, value in found.items() if not finite(value)]
    if found:
        report.finite = not wild
    else:
        report.said.problems.append("no tensors")
    tell(report.said.problems, f"of {len(found)} tensors hold numbers that are not finite", wild)
    return found


def _try(report: Report, path: Path, model: nn.Module) -> None:
    """Load it onto the backbone and take it off again; where that fails, say what a partial load would leave out."""
    name = "check"
    report.onto = type(model).__name__
    size = sum(p.numel() for _, p in base_parameters(model))
    report.share = report.parameters / max(size, 1)
    for partial in (False, True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                adapter = load(model, path, name, partial=partial)
            except GraftError as error:
                if not partial:
                    report.said.problems += [text for text in [error.found] if text not in report.said.problems]
                continue
        report.said.methods = [str(method) for method in adapter.methods]
        report.parameters = adapter.num_parameters
        report.share = report.parameters / max(size, 1)
        told = [str(w.message).partition(": ")[2] for w in said if issubclass(w.category, UserWarning)]
        report.said.notes += [f"with --partial it loads; {text}" if partial else text for text in told]
        remove(model, name)
        report.loads = not partial
        return
