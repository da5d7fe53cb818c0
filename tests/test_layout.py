"""The layout of the source: one direction of imports, small files, light import. Runs under pytest and by itself (`make check`)."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "graftwork"

# folder -> folders it may import; every folder may import itself
GRAFT = {"products", "core", "sites", "expressions", "batched", "grafting"}  # what everything but a method may use
METHODS = {"products", "core", "sites"}
BELOW: dict[str, set[str]] = {
    "products": set(),
    "core": {"products"},
    "sites": {"core"},
    "expressions": {"products", "core", "sites"},
    "batched": {"core", "expressions"},
    "grafting": GRAFT - {"grafting"},
    "methods": METHODS,
    "combinators": METHODS,
    "schedules": {*GRAFT, "methods"},
    "initialise": {*GRAFT, "methods"},
    "objectives": METHODS,
    "systems": {*METHODS, "methods", "combinators", "schedules", "initialise"},
    "store": GRAFT,
    "formats": {*GRAFT, "methods", "store", "values"},
    "values": {*GRAFT, "methods", "combinators", "store"},
}
BELOW["train"] = {*GRAFT, *BELOW} - {"train"}
BELOW["bench"] = {*BELOW, "train"}
BELOW["cli"] = {*BELOW, "bench"}
LIMITS = {**dict.fromkeys(GRAFT, 300), "methods": 150, "combinators": 150, "formats": 200, "values": 200, "cli": 120}


def imports(path: Path) -> set[str]:
    """The folders of graftwork that a file imports."""
    found = set()
    inside = path.relative_to(SOURCE).parts
    tree = ast.parse(path.read_text())
    # a name of a type, for what is handed in from above, is read by people and the type checker, and never imported
    typed = {id(n) for node in ast.walk(tree) if _for_types(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["graftwork", *inside[: len(inside) - node.level]]
            names = [".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "graftwork" and len(parts) > 1:
                found.add(parts[1])
    return found


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_imports_go_one_way() -> None:
    wrong = []
    for path in files():
        folder = path.relative_to(SOURCE).parts[0]
        if folder.endswith(".py"):
            continue
        assert folder in BELOW, f"{folder} has no place in the import order"
        folders = {name for name in imports(path) if (SOURCE / name).is_dir()}
        for other in folders - {folder} - BELOW[folder]:
            wrong.append(f"{path.relative_to(SOURCE)} imports graftwork.{other}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_long() -> None:
    long = []
    for path in files():
        lines = len(path.read_text().splitlines())
        limit = LIMITS.get(path.relative_to(SOURCE).parts[0], 400)
        if lines > limit:
            long.append(f"{path.relative_to(SOURCE)}: {lines} lines, at most {limit}")
    assert not long, "\n".join(long)


def test_no_file_is_named_for_nothing() -> None:
    assert not [p for p in files() if p.stem in {"utils", "helpers", "misc", "common"}]


def test_import_is_light() -> None:
    code = "import sys, graftwork; heavy = {'torch', 'transformers', 'datasets', 'sklearn'} & set(sys.modules); print(heavy)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()", out


def test_help_is_fast() -> None:
    code = "from graftwork.cli import main; main(['--help'])"
    subprocess.run([sys.executable, "-c", code], capture_output=True)  # the files are in the cache now
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    # 0.5 s on a free machine; other tests run beside this one
    assert min(times) < 1.5, times


if __name__ == "__main__":
    test_imports_go_one_way()
    test_no_file_is_long()
    test_no_file_is_named_for_nothing()
    print("imports go one way, files are small")
