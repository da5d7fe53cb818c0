"""Expressions as text: one grammar, one parser, one printer."""

from __future__ import annotations

import functools
import operator

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

import graftwork as gw
from graftwork.core.errors import GraftError
from graftwork.expressions.algebra import A, Expr, Mean, Rows, Stack, Sum, linear
from graftwork.expressions.grammar import parse
from graftwork.expressions.mixing import bare

names = st.one_of(
    st.from_regex(r"[\w./-]+", fullmatch=True),
    st.text(min_size=1).filter(lambda t: max(t) < "\ud800" or min(t) > "\udfff"),
    st.sampled_from(["rows", "mean", "drop", "none", "layers", "-a", "1e-5", "2", "a - b", "-", ">>"]),
)
factors = st.floats(min_value=-1e30, max_value=1e30, allow_nan=False)
layers = st.sampled_from(["0-4", "-1", "0, 2-3,-1", " 1 - -1 "])


def larger(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.one_of(
        st.lists(inner, min_size=2, max_size=4).map(lambda of: of[0] >> of[1] if len(of) == 2 else sum_of(of)),
        st.tuples(inner, inner).map(lambda pair: pair[0] - pair[1]),
        st.tuples(factors, inner).map(lambda pair: pair[0] * pair[1]),
        inner.map(lambda e: -e),
        st.lists(inner, min_size=1, max_size=3).map(lambda of: gw.mean(*of)),
        st.tuples(inner, layers).map(lambda pair: gw.drop(*pair)),
        st.tuples(several(inner), st.one_of(st.none(), names)).map(lambda given: gw.fuse(*given[0], by=given[1])),
        st.tuples(several(inner), names).map(lambda given: gw.route(*given[0], by=given[1])),
        st.lists(st.tuples(inner, st.integers(1, 99)), min_size=1, max_size=3).map(lambda pairs: gw.split(*pairs)),
        st.tuples(inner, inner).map(lambda pair: gw.split((pair[0], 4), (pair[1], -1))),
    )


def several(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[list[Expr]]:
    return st.lists(inner, min_size=1, max_size=3, unique_by=bare)


def sum_of(of: list[Expr]) -> Expr:
    total = of[0]
    for e in of[1:]:
        total = total + e
    return total


plain = st.recursive(names.map(A), larger, max_leaves=8)
expressions = st.one_of(
    plain,
    st.lists(plain, min_size=2, max_size=4).map(lambda of: functools.reduce(operator.or_, of)),
    st.lists(st.one_of(st.none(), plain), min_size=1, max_size=4).map(gw.rows),
)


@given(expressions)
@limits(
    suppress_health_check=[HealthCheck.too_slow], deadline=None
)  # the first draw builds hypothesis' tables of Unicode
def test_what_is_printed_parses_back(e: Expr) -> None:
    assert parse(str(e)) == e


@given(st.one_of(st.text(), st.text('ab0.5*-+>()," ='), st.lists(st.sampled_from(TOKENS := [
    "a", "b", "0.5", "*", "+", "-", ">>", "|", "(", ")", ",", "mean", "rows", "drop", "none", "layers", "=", '"0-4"', " ",
    "fuse", "route", "split", "by", "4",
])).map("".join)))  # fmt: skip
def test_any_text_parses_or_is_refused_by_name(text: str) -> None:
    try:
        assert parse(str(parse(text))) == parse(text)
    except GraftError as error:
        assert "expression" in error.asked


def test_stacks_and_sums_are_flat() -> None:
    assert (A("a") >> "b") >> "c" == A("a") >> (A("b") >> "c") == parse("a >> (b >> c)")
    assert parse("a >> b >> c").names() == ("a", "b", "c")
    assert (A("a") + "b") - "c" == A("a") + (A("b") - "c") == parse("a + (b - c)")
    assert 2 * (A("a") - "b") == 2 * A("a") - 2 * A("b") == Sum(((2.0, A("a")), (-2.0, A("b"))))
    minus = -A("a")
    assert 1 * A("a") == A("a") == -minus


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("0.7*a + 0.3*b", 0.7 * A("a") + 0.3 * A("b")),
        ("-a", -A("a")),
        ("a - -2*b", A("a") + 2 * A("b")),
        ("a-b", A("a-b")),
        ("a -b", A("a") - A("b")),
        ("2*2", 2 * A("2")),
        ("1e-3 * a", 1e-3 * A("a")),
        ("a + b >> c", (A("a") + A("b")) >> "c"),
        ("a + (b >> c)", A("a") + (A("b") >> "c")),
        ("0.5*(a + b)", 0.5 * A("a") + 0.5 * A("b")),
        ("mean(a, b >> c)", Mean((A("a"), Stack((A("b"), A("c")))))),
        ('drop(a + b, layers="0-4")', gw.drop(A("a") + "b", "0-4")),
        ("rows(0.5*a + 0.5*b, none)", Rows((0.5 * A("a") + 0.5 * A("b"), None))),
        ("mean + rows", A("mean") + A("rows")),
        ("a >> b | 0.5*c", (A("a") >> "b") | 0.5 * A("c")),
        ("a | (b | c)", A("a") | "b" | "c"),
    ],
)
def test_what_a_text_means(text: str, meaning: Expr) -> None:
    assert parse(text) == meaning == parse(str(meaning))


def test_like_terms_are_exact() -> None:
    a, b = A("a"), A("b")
    assert linear(a - a) == linear(0 * a) == []
    for n in range(1, 60):
        assert linear(gw.mean(*[a] * n)) == [(1.0, a)]
    assert linear(gw.mean(a, b) + gw.mean(a, -b)) == [(1.0, a)]
    assert linear((a >> b) - (a >> b) + 0.5 * b) == [(0.5, b)]


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("a >> ", 5),
        ("a b", 2),
        ("(a >> b", 7),
        ("a >> ?", 5),
        ("", 0),
        ("a + ", 4),
        ("a * 2", 0),
        ("x*a", 0),
        ("1e999*a", 0),
        ("1e300*(1e300*a)", 0),
        ("nan*a", 0),
        ("mean()", 5),
        ("mean(a", 6),
        ("mean(a,)", 7),
        ("a >> fused(b)", 5),
        ("fuse(a, a)", 5),
        ("fuse(a, by=)", 11),
        ("route(a, b)", 10),
        ("split(a)", 7),
        ("split(a=x)", 8),
        ("split(a=-1, b=2)", 6),
        ("drop(a)", 6),
        ("drop(a, 0-4)", 8),
        ("drop(a, layers=4)", 15),
        ('drop(a, layers="x")', 15),
        ("mean(rows(a))", 5),
        ("rows(a) + b", 8),
        ('"\\x"', 0),
        ("a |", 3),
        ("(a | b) >> c", 8),
        ("a >> (b | c)", 2),
        ("mean(a | b)", 5),
        ("rows(a) | b", 8),
    ],
)
def test_an_error_points_at_the_character(text: str, column: int) -> None:
    with pytest.raises(GraftError) as caught:
        parse(text)
    line = str(caught.value).splitlines()[2]
    assert line.index("^") - 4 == column


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), "0.5", None, True, 1j])
def test_a_factor_is_a_finite_number(factor: object) -> None:
    with pytest.raises(GraftError, match="no finite number"):
        factor * A("a")  # type: ignore[operator]


@pytest.mark.parametrize(
    "make",
    [
        gw.mean,
        lambda: gw.mean(gw.rows(["a"])),
        lambda: 2 * gw.rows(["a"]),
        lambda: gw.mean("a", 3),
        lambda: gw.drop("a", "x"),
        lambda: gw.drop("a", 3),
        lambda: gw.drop(gw.rows(["a"]), "0"),
        lambda: 1e300 * (1e300 * A("a")),
        lambda: A("a") + 1,
    ],
)
def test_bad_expressions(make) -> None:
    with pytest.raises(GraftError):
        make()
