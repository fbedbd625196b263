"""A name matches only as it is written, in linear time; a name nobody can read counts as none."""

import fnmatch
import re
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from korora.policy.names import NAME_CHARACTERS_MAX, PATTERN_CHARACTERS_MAX, Glob, spelled, telling

ALPHABET = "abA*?[]!-.\n\\é"
patterns = st.text(ALPHABET, min_size=1, max_size=12)
names = st.text(ALPHABET, max_size=12)


def oracle(pattern: str, name: str) -> bool:
    """fnmatch(3) of the standard library, case-sensitive, for a pattern that ``Glob`` takes."""
    return re.match(fnmatch.translate(pattern), name) is not None


@given(patterns, names)
def test_it_agrees_with_fnmatch(pattern: str, name: str) -> None:
    try:
        glob = Glob(pattern)
    except ValueError:
        return  # a bracket that is not closed is itself to fnmatch, and an error of the file here
    assert glob.matches(name) == oracle(pattern, name), (pattern, name)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("web-*", "web-1", True),
        ("web-*", "web-", True),
        ("web-*", "WEB-1", False),
        ("web-?", "web-10", False),
        ("web-[0-9]", "web-7", True),
        ("web-[!0-9]", "web-7", False),
        ("web-[!0-9]", "web-x", True),
        ("[*]", "*", True),
        ("[*]", "x", False),
        ("[[]x]", "[x]", True),
        ("[]]", "]", True),
        ("*", "", True),
        ("a*b*c", "aXbYc", True),
        ("a*b*c", "aXbY", False),
        ("*.example", "evil.example\n", False),
        ("web-1", "web-1\n", False),
        ("web-1", "\nweb-1", False),
        ("straße", "STRASSE", False),
    ],
)
def test_examples(pattern: str, name: str, matches: bool) -> None:
    assert Glob(pattern).matches(name) is matches
    assert oracle(pattern, name) is matches


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "x" * (PATTERN_CHARACTERS_MAX + 1),
        "web-[1",
        "[",
        "[!",
        "[z-a]",
        "[\u0001-\uffff]",
        "[" + "ab" * 62 + "0-9a-z]",
    ],
)
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"characters|closed|range"):
        Glob(pattern)


def test_no_pattern_is_slow() -> None:
    """As many stars as there is room for, against a name that nearly matches: a backtracking matcher takes years."""
    glob = Glob("*a" * (PATTERN_CHARACTERS_MAX // 2))
    name = "a" * (NAME_CHARACTERS_MAX - 1) + "b"
    began = time.process_time()
    for _ in range(20):
        assert not glob.matches(name)
    assert time.process_time() - began < 1.0  # some 2 ms


def test_a_long_name_matches_nothing() -> None:
    assert Glob("*").matches("x" * NAME_CHARACTERS_MAX)
    assert not Glob("*").matches("x" * (NAME_CHARACTERS_MAX + 1))


@pytest.mark.parametrize("name", ["web-1", "a b", "*", "[x]", "~", '"'])
def test_names_that_tell(name: str) -> None:
    assert telling(name, unicode=False)
    assert telling(name, unicode=True)


@pytest.mark.parametrize(
    "name",
    [
        *("", "x\n", "\x00", "x\x7f", "x\x1b[2J", "x\u200b", "x\u202e1-bew", "x\u2028", "x\ud800", "x\ue000"),
        *("e\u0301", "x\u0085", "x\u00ad", "x\u0378", "x" * (NAME_CHARACTERS_MAX + 1), "é" * (NAME_CHARACTERS_MAX + 1)),
    ],
)
def test_names_that_do_not(name: str) -> None:
    assert not telling(name, unicode=True)
    assert not telling(name, unicode=False)


def test_beyond_ascii_only_where_it_is_allowed() -> None:
    homoglyph = "pr\u043ed-1"  # a Cyrillic o
    assert not telling(homoglyph, unicode=False)
    assert telling(homoglyph, unicode=True)
    assert unicodedata.is_normalized("NFC", homoglyph)
    assert not Glob("prod-*").matches(homoglyph)


def test_people_are_shown_every_character_that_is_there() -> None:
    assert spelled("pr\u043ed-1\n\u202e\\") == r"pr\u043ed-1\n\u202e\\"
    assert spelled("web-1") == "web-1"
    assert spelled("x" * 300) == "x" * NAME_CHARACTERS_MAX + "..."


@given(st.text(max_size=40), st.text(max_size=40))
def test_two_names_are_never_spelled_alike(one: str, other: str) -> None:
    assert (spelled(one) == spelled(other)) == (one == other)
    assert spelled(one).isascii()
