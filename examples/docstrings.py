"""A real text task that needs no download: which standard-library package does a docstring come from?

Read with `ast` from the running Python. The 8 packages with most docstrings are the classes. The split is by file: no file has
docstrings on both sides, and neither has two equal docstrings.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CLASSES = 8
SKIPPED = {"test", "tests", "idle_test", "site-packages", "__pycache__"}


@dataclass(frozen=True)
class Docstring:
    """One docstring: its text, its package, and the file it stands in."""

    text: str
    label: str
    file: str


def read() -> list[Docstring]:
    """Every docstring of the standard library's packages, with the 8 most frequent packages kept."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(library.glob("*/**/*.py")):
        parts = path.relative_to(library).parts
        if SKIPPED.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # lib2to3 and the like hold Python 2 files
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text.split()) >= 3:
                    found.append(Docstring(" ".join(text.split()), parts[0], str(path.relative_to(library))))
    most = {label for label, _ in Counter(d.label for d in found).most_common(CLASSES)}
    return [d for d in found if d.label in most]


def split(docstrings: list[Docstring], share: float = 0.25) -> tuple[list[Docstring], list[Docstring]]:
    """(train, test): about `share` of each package's docstrings in test, whole files at a time, duplicates dropped.

    Files are taken in the order of their names' hashes, so that the split is the same everywhere.
    """
    test_files: set[str] = set()
    for label in {d.label for d in docstrings}:
        sizes = Counter(d.file for d in docstrings if d.label == label)
        files = sorted(sizes, key=lambda f: hashlib.sha256(f.encode()).hexdigest())
        wanted = share * sum(sizes.values())
        taken = 0
        for file in files:
            if taken + sizes[file] <= wanted * 1.15:
                test_files.add(file)
                taken += sizes[file]
    train = [d for d in docstrings if d.file not in test_files]
    texts = {d.text for d in train}
    test = [d for d in docstrings if d.file in test_files and d.text not in texts]
    return list({d.text: d for d in train}.values()), list({d.text: d for d in test}.values())


if __name__ == "__main__":
    train, test = split(read())
    assert not {d.file for d in train} & {d.file for d in test}
    for name, rows in (("train", train), ("test", test)):
        print(name, len(rows), dict(Counter(d.label for d in rows).most_common()))
    print("words", sorted(len(d.text.split()) for d in train)[:: len(train) // 10])
