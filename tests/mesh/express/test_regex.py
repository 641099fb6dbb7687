from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mesh.express import regex
from mesh.express.atoms import Atom, walk
from mesh.express.automata import BYTES
from mesh.express.dfa import TooLarge
from mesh.express.regex import NotRegular, Pattern

ANY_TEXT = ({byte: (0, byte) for byte in range(BYTES)},)
_LETTERS = st.sampled_from(
    ["a", "b", "/", ".", r"\d", r"\w", r"\S", "[a-c]", "[^/]", r"[\d.-]", r"\.", "[^a-z]", "é", "€", r"[\W€]"]
)
_PATTERNS = st.recursive(
    _LETTERS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "+?", "{0,2}?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


def _walk(pattern: str):
    compiled = re.compile(pattern)
    return walk({Atom("RegularExpression", pattern): lambda text: compiled.fullmatch(text) is not None}, ANY_TEXT)


def _matching(pattern: str, data: st.DataObject | None) -> list[str]:
    """Some texts that match."""
    latin = st.from_regex(pattern, fullmatch=True).filter(lambda text: max(text, default=" ") < "\u0100")
    return data.draw(st.lists(latin, max_size=3)) if data is not None else []


_TEXTS = st.lists(st.text("ab/.19x-_\n é\xff", max_size=8), max_size=8)


@given(_PATTERNS, _TEXTS, st.data())
@settings(max_examples=300, deadline=None)
@example("a|ab|", ["", "a", "ab", "b"], None)
@example("^/a.*$", ["/a", "/ab", "x/a"], None)
def test_as_python_reads_it(pattern, texts, data):
    assume(len(pattern) < 80)
    try:
        found = _walk(pattern)
    except TooLarge:
        assume(False)
    where = {byte: place for place, cls in enumerate(found.classes) for byte in cls}
    for text in texts + _matching(pattern, data):
        at = 0
        for byte in text.encode("latin-1"):
            at = found.spots[at].next[where[byte]]
        assert bool(found.spots[at].matched) is (re.fullmatch(pattern, text) is not None), text


@given(_PATTERNS, _TEXTS, st.data())
@settings(max_examples=100, deadline=None)
@example("a|ab|", ["", "a", "ab", "b"], None)
@example("^/a.*$", ["/a", "/ab", "x/a"], None)
def test_a_text_is_walked_as_python_reads_it(pattern, texts, data):
    assume(len(pattern) < 80)
    try:
        walk = Pattern(pattern)
    except TooLarge:
        assume(False)
    for text in texts + _matching(pattern, data):
        for _ in range(2):  # found, and remembered
            assert walk(text.encode("latin-1")) is (re.fullmatch(pattern, text) is not None), text


def test_what_is_remembered_has_a_limit(monkeypatch):
    monkeypatch.setattr(regex, "MOVES_MAX", 3)
    walk = Pattern("(?:ab|ac|b)*c")
    assert walk(b"abacbbabc") and not walk(b"abacbbab")
    assert len(walk._moves) <= 3


@pytest.mark.parametrize("pattern", ["a(?=b)", r"(a)\1", r"a\b", "a^b", "(?i)a", "(?>a)", "a*+", "(?:^a|b)", "a$b"])
def test_not_regular(pattern):
    with pytest.raises(NotRegular):
        _walk(pattern)


@pytest.mark.parametrize("pattern", ["a{1000}", "(?:a{40}b{40}){20}", "a.{0,500}b.{0,500}", ".*a.{12}"])
def test_too_large(pattern):
    with pytest.raises(TooLarge):
        _walk(pattern)
