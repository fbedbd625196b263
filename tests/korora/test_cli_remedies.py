"""Every error that ends a command says what to do, on one line."""

from collections.abc import Iterator

import msgspec
import pytest

from crypto import errors as crypto
from korora.agents.vtpm import letters
from korora.errors import PREFIX, line_of, remedy_of
from proxy import errors as proxy

BASES = {crypto.CryptoError, proxy.RelayError}
# Raised with words and a remedy of their own, or with other arguments.
OWN = (crypto.IdentityError, crypto.PkiError, crypto.TpmError, crypto.LogUnusable, proxy.ConfigurationError)


def descendants(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        if child.__module__ in {"crypto.errors", "proxy.errors"}:
            yield child
            yield from descendants(child)


KINDS = sorted({kind for base in BASES for kind in descendants(base)}, key=lambda kind: kind.__name__)
PLAIN = [
    kind
    for kind in KINDS
    if not issubclass(kind, (*OWN, proxy.PeerAborted, proxy.Interrupted)) and not kind.__name__.startswith("_")
]


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_each_kind_has_a_remedy(kind: type[Exception]) -> None:
    line = line_of(kind("it went\nwrong"))
    assert line == f"{PREFIX}it went wrong; {remedy_of(kind('x'))}"
    assert remedy_of(kind("x"))[-1] not in ".;"
    assert proxy.exit_code_of(kind("x")) in {3, 4, 5, 6, 7}


def test_words_of_others_cannot_write_on_the_terminal() -> None:
    """A letter of korora vtpm is read before anybody knows whose it is, and its field's name is in the refusal."""
    letter = msgspec.msgpack.encode({"\x1b]0;gone\x07\x1b[2J": 1})
    with pytest.raises(proxy.VtpmRefused) as refusal:
        letters._decoded(letter, letters.Letter, "a letter")
    assert "?]0;gone??[2J" in line_of(refusal.value)
    assert line_of(refusal.value).isprintable()


def test_a_remedy_of_its_own_wins() -> None:
    assert line_of(proxy.ConfigurationError("no", "do this.")) == f"{PREFIX}no; do this"
    assert line_of(crypto.CrlExpired("no", "renew it")) == f"{PREFIX}no; renew it"


def test_a_peer_s_end_and_a_signal() -> None:
    assert line_of(proxy.PeerAborted(7, "QEMU died")).endswith("QEMU died; the other relay's log says more")
    assert line_of(proxy.Interrupted(15)) == f"{PREFIX}stopped by signal 15"  # nothing went wrong


def test_what_is_not_ours_is_called_a_bug() -> None:
    line = line_of(ZeroDivisionError("division by zero"))
    assert (
        line == f"{PREFIX}ZeroDivisionError: division by zero; this is a bug of Kororā: --log-level debug shows where"
    )
