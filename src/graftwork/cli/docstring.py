"""What the documentation of a method says, by its parts."""

from __future__ import annotations

import inspect
import re


def cell(text: str) -> str:
    """Text for a table in markdown: in one line, its signs no markup."""
    return re.sub(r"([|*_<>])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Text for a table in markdown, as code."""
    return "`" + text.replace("|", r"\|") + "`"


def parts(doc: str) -> dict[str, str]:
    """what: the first paragraph;  Parameters, Source, When: what follows these words;  more: the rest."""
    doc = inspect.cleandoc(doc)
    what, _, rest = doc.partition("\n\n")
    found = {"what": what}
    # each of these ends where the next one, or a line that is not a continuation, begins
    for word in ("When", "Source", "Parameters"):
        match = re.search(rf"(?:(?<=^)|(?<=\n)|(?<=  )){word}([^:\n]*): ((?:.|\n(?= +\S))*)", rest)
        if match:
            scope = match[1].strip()
            found[word] = (f"{scope}: " if scope else "") + " ".join(match[2].split())
            rest = rest[: match.start()] + rest[match.end() :]
    found["more"] = "\n".join(line.rstrip() for line in rest.strip().split("\n") if line.strip())
    return found
