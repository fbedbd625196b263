"""What a hostile guest's or peer's name can match, and how long that may take. Pure.

A name is data: no character of it ever acts as a pattern. It is compared code point by code point: no case is folded,
nothing is normalised, no line break ends it early.
"""

import unicodedata
from typing import Final

PATTERN_CHARACTERS_MAX: Final = 128  # the longest name of a certificate has 63, a UUID 36
NAME_CHARACTERS_MAX: Final = 255  # of a machine: Xen's and libvirt's are shorter; longer ones match nothing
SET_CHARACTERS_MAX: Final = 128  # in one pair of brackets, its ranges written out

_UNPRINTED: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""General categories (Unicode, table 12 of UAX #44) of what no screen shows as itself."""


class Glob:
    """A pattern of ``*``, ``?``, ``[abc]``, ``[a-z]`` and ``[!abc]``; the whole name must match, as with fnmatch(3).

    Every position of the pattern that may be reached is one bit of an integer, so that each character of a name costs
    one step whatever the pattern is: nothing is tried twice, and no name is slow (Baeza-Yates and Gonnet 1992).

    Args:
        text: the pattern; `[[]` is an opening bracket itself, `[*]` an asterisk.

    Raises:
        ValueError: it is empty, too long, or a bracket is not closed.
    """

    __slots__ = ("_accept", "_any", "_loops", "_named", "text")

    def __init__(self, text: str) -> None:
        if not 1 <= len(text) <= PATTERN_CHARACTERS_MAX:
            raise ValueError(f"a pattern has 1 to {PATTERN_CHARACTERS_MAX} characters")
        self.text = text
        self._named: dict[str, int] = {}  # which positions take a character that the pattern names
        self._any = 0  # which positions take one that it does not name
        self._loops = 0  # where a * stands: that position may be kept
        length = at = 0
        takers: list[tuple[int, str, bool]] = []  # position, its characters, whether it takes all others instead
        while at < len(text):
            if text[at] == "*":
                self._loops |= 1 << length
                at += 1
                continue
            characters, but, at = _token(text, at)
            takers.append((length, characters, but))
            self._any |= but << length
            length += 1
        for character in {each for _, characters, _ in takers for each in characters}:
            self._named[character] = sum(1 << place for place, them, but in takers if (character in them) != but)
        self._accept = 1 << length

    def matches(self, name: str) -> bool:
        """Whether the whole of ``name`` does; longer names than NAME_CHARACTERS_MAX do not."""
        if len(name) > NAME_CHARACTERS_MAX:
            return False
        reached = 1
        for character in name:
            takes = self._named.get(character, self._any)
            reached = ((reached & takes) << 1) | (reached & self._loops)
            if not reached:
                return False
        return bool(reached & self._accept)

    def __repr__(self) -> str:
        return f"Glob({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Glob) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def _token(text: str, at: int) -> tuple[str, bool, int]:
    """What one position takes: its characters, whether all but those, and where the next token begins."""
    if text[at] == "?":
        return "", True, at + 1
    if text[at] != "[":
        return text[at], False, at + 1
    but = text[at + 1 : at + 2] == "!"
    first = at + 1 + but
    end = text.find("]", first + 1)  # a bracket that comes first is one of the set, as with fnmatch
    if end < 0:
        raise ValueError(f"{text!r}: a bracket is not closed; write [[] for the bracket itself")
    characters: list[str] = []
    inner = text[first:end]
    while inner:
        if len(inner) > 2 and inner[1] == "-":
            low, high = ord(inner[0]), ord(inner[2])
            if not 0 <= high - low < SET_CHARACTERS_MAX:
                raise ValueError(f"{text!r}: {inner[:3]} is no range of up to {SET_CHARACTERS_MAX} characters")
            characters += map(chr, range(low, high + 1))
            inner = inner[3:]
        else:
            characters.append(inner[0])
            inner = inner[1:]
    if len(characters) > SET_CHARACTERS_MAX:
        raise ValueError(f"{text!r}: more than {SET_CHARACTERS_MAX} characters in brackets")
    return "".join(characters), but, end + 1


def telling(name: str, *, unicode: bool) -> bool:
    """Whether a machine's name can be believed to be what an operator sees; others count as not told.

    Args:
        name: as the stream has it.
        unicode: whether more than ASCII's printed characters and the space may be in it. Then what is not printed is
            still refused, and what is not in normal form C, which looks like another name that is.
    """
    if not 1 <= len(name) <= NAME_CHARACTERS_MAX:
        return False
    if name.isascii() or not unicode:
        return name.isascii() and name.isprintable()
    return unicodedata.is_normalized("NFC", name) and not any(
        unicodedata.category(character) in _UNPRINTED for character in name
    )


def spelled(name: str) -> str:
    """A name as it can be put before people: what is not ASCII, or not printed, as escapes; cut at 255 characters."""
    cut = name[:NAME_CHARACTERS_MAX]
    told = cut.encode("unicode_escape").decode("ascii")
    return told if len(cut) == len(name) else f"{told}..."
