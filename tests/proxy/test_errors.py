"""Exit codes belong to classes, and every class of the two trees has one."""

import re
from collections.abc import Iterator

import pytest

from crypto import errors as crypto_errors
from proxy import errors
from proxy.errors import (
    EXIT_BUG,
    OUTCOMES,
    ConfigurationError,
    Interrupted,
    PeerAborted,
    RelayError,
    exit_code_of,
)


def descendants(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def make(kind: type[Exception]) -> Exception:
    if issubclass(kind, PeerAborted):
        return kind(7, "x")
    if issubclass(kind, Interrupted):
        return kind(15)
    if issubclass(kind, crypto_errors.IdentityError | crypto_errors.PkiError):
        return kind("x", "y")
    return kind("x")


CRYPTO_CODES = {
    crypto_errors.AuthenticationError: 4,
    crypto_errors.IntegrityError: 5,
    crypto_errors.IdentityError: 2,
    crypto_errors.PkiError: 2,
    crypto_errors.ReceiptError: 5,
    crypto_errors.LogUnusable: 2,
}


@pytest.mark.parametrize("base", CRYPTO_CODES, ids=lambda base: base.__name__)
def test_all_of_a_branch_of_crypto_has_its_code(base: type[Exception]) -> None:
    for kind in (base, *descendants(base)):
        assert exit_code_of(make(kind)) == CRYPTO_CODES.get(kind, CRYPTO_CODES[base]), kind


def test_every_class_of_the_relay_has_a_code_of_the_table() -> None:
    for kind in descendants(RelayError):
        if kind.__name__.startswith("_"):
            continue  # never leaves its module
        code = exit_code_of(make(kind))
        assert code in OUTCOMES or code in {130, 143}, kind
        assert code != EXIT_BUG, kind


@pytest.mark.parametrize(("module", "base"), [(errors, RelayError), (crypto_errors, crypto_errors.CryptoError)])
def test_the_docstrings_tree_is_the_tree(module: object, base: type[Exception]) -> None:
    """Drawn with its branches: what stands further right hangs under the nearest one further left."""
    path: list[tuple[int, str]] = []
    drawn = {}
    for line in str(module.__doc__).splitlines():
        match = re.match(
            r"^(?P<branch>[ │├└─]*)(?P<name>[A-Z]\w+(?:Error|Refused|Violation|Corrupt|Lost|Failed|Aborted|Cancelled"
            r"|Unreachable|Vanished|Failure|Unknown|Changed|Missing|Untrusted|Expired|Revoked|Malformed|Mismatch|TooLarge|Forged"
            r"|OutOfOrder|Replayed|Gap|AfterFinal|Invalid|Reused|Exhausted|Permissions|Exists|Broken|Busy|Damaged|Truncated|Forked|Unusable))\b",
            line,
        )
        if match is None or len(match["branch"]) < 4:
            continue
        depth = len(match["branch"])
        path = [entry for entry in path if entry[0] < depth]
        drawn[match["name"]] = path[-1][1] if path else None
        path.append((depth, match["name"]))
    real = {
        kind.__name__: kind.__bases__[0].__name__ for kind in descendants(base) if kind.__module__ == module.__name__
    }  # type: ignore[attr-defined]
    assert len(drawn) >= 8
    hidden = {"Interrupted"} | {name for name in real if name.startswith("_")}
    assert {name: parent for name, parent in drawn.items() if parent is not None} == {
        name: (real[parent] if parent in hidden else parent) for name, parent in real.items() if name not in hidden
    }


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), OSError(5, "x"), RelayError("x"), MemoryError()])
def test_what_nobody_thought_of_is_a_bug_of_ours(error: Exception) -> None:
    assert exit_code_of(error) == EXIT_BUG


@pytest.mark.parametrize(("named", "seen"), [(3, 3), (4, 4), (5, 5), (6, 6), (7, 7)])
def test_a_reason_that_concerns_both_sides_is_shared(named: int, seen: int) -> None:
    assert PeerAborted(named, "x").code == seen


@pytest.mark.parametrize("named", [0, 1, 2, 70, 130, 143, 65535])
def test_a_peers_own_trouble_is_a_lost_peer(named: int) -> None:
    """Whatever code a peer names, this side never takes it for success, for its own bug or for a signal."""
    assert PeerAborted(named, "x").code == 6


def test_signals() -> None:
    assert exit_code_of(Interrupted(2)) == 130
    assert exit_code_of(Interrupted(15)) == 143


def test_a_remedy_is_kept_apart() -> None:
    error = ConfigurationError("what is wrong", "what to do")
    assert (str(error), error.remedy) == ("what is wrong", "what to do")
