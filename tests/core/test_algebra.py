"""Expressions: one grammar, one parser, one printer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.core.algebra import A, Stack, parse
from graftwork.core.errors import GraftError

names = st.one_of(
    st.from_regex(r"[\w./-]+", fullmatch=True),
    st.text(min_size=1).filter(lambda t: max(t) < "\ud800" or min(t) > "\udfff"),
)
atoms = names.map(A)
expressions = st.lists(atoms, min_size=1, max_size=5).map(lambda of: of[0] if len(of) == 1 else Stack(tuple(of)))


@given(expressions)
def test_what_is_printed_parses_back(e) -> None:
    assert parse(str(e)) == e


@given(st.text())
def test_any_text_parses_or_is_refused_by_name(text: str) -> None:
    try:
        assert parse(str(parse(text))) == parse(text)
    except GraftError as error:
        assert "expression" in error.asked


def test_stacks_are_flat() -> None:
    assert (A("a") >> "b") >> "c" == A("a") >> (A("b") >> "c") == parse("a >> (b >> c)")
    assert parse("a >> b >> c").names() == ("a", "b", "c")


@pytest.mark.parametrize(("text", "column"), [("a >> ", 5), ("a b", 2), ("(a >> b", 7), ("a >> ?", 5), ("", 0)])
def test_an_error_points_at_the_character(text: str, column: int) -> None:
    with pytest.raises(GraftError) as caught:
        parse(text)
    line = str(caught.value).splitlines()[2]
    assert line.index("^") - 4 == column
