"""The README's table of methods is the one the code gives: `python tests/test_readme.py` writes it anew."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- methods -->\n", "<!-- /methods -->\n"


def generated() -> str:
    import graftwork.combinators
    import graftwork.methods  # noqa: F401  (both register)
    from graftwork.cli.methods import markdown, row
    from graftwork.core.method import PRESETS, REGISTRY

    # only what the package itself registers: tests and examples register methods of their own
    own = [name for name, made in {**REGISTRY, **PRESETS}.items() if made.__module__.startswith("graftwork.")]
    return markdown([row(name) for name in sorted(own)]) + "\n"


def test_the_table_of_methods_is_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(START)[1].split(END)[0] == generated(), "run: python tests/test_readme.py"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    README.write_text(before + START + generated() + END + rest.split(END)[1], encoding="utf-8")
