"""Whatever stands in the files of a log, or comes from a peer, only documented errors leave, and nothing hangs."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from crypto.errors import CryptoError, LogDamaged, ReceiptError
from crypto.receipts import bundle
from crypto.receipts.audit import audit
from crypto.receipts.checkpoint import verify
from crypto.receipts.dsse import decode
from crypto.receipts.log import ENTRIES, HEAD, INDEX, ReceiptLog
from crypto.receipts.peers import PeerHeads
from crypto.receipts.signers import Trust, read_signer
from crypto.receipts.statement import parse
from tests.crypto.receipts.making import ALPHA, Known, filled, receipt

TRUST = Known()


def _whole() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        log = filled(Path(folder) / "log", 4)
        log.checkpoint("alpha", ALPHA)
        return {name: (log.folder / name).read_bytes() for name in (ENTRIES, INDEX, HEAD)}


WHOLE = _whole()
PIECES = st.one_of(
    st.binary(max_size=80),
    st.sampled_from([b"\n", b"\0" * 8, b"\0" * 300, b"\xff" * 8, b'{"payload":""}\n']),
    *(
        st.tuples(st.integers(0, len(content)), st.integers(0, len(content))).map(
            lambda cut, content=content: content[min(cut) : max(cut)]
        )
        for content in WHOLE.values()
    ),
)
ANY = st.lists(PIECES, max_size=4).map(b"".join)
FILES = {name: st.just(content) | ANY for name, content in WHOLE.items()}


@given(st.fixed_dictionaries(FILES))
def test_a_log_of_any_bytes_is_damaged_or_works(contents: dict[str, bytes]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        found = audit(folder, TRUST, "alpha")
        log = ReceiptLog(folder)
        try:
            index = log.append(receipt(9))
        except ReceiptError:
            assert contents[ENTRIES] == (folder / ENTRIES).read_bytes() or not found.findings
            return
        assert log.entry(index) == receipt(9)
        size, root = log.head()
        assert (size, root) == (index + 1, log.root(index + 1))
        try:
            assert len(list(log.entries())) == size
        except LogDamaged:
            assert found.findings  # what is cheap was in order, and not all that is read


@given(ANY)
def test_what_a_peer_sends_is_refused_in_our_own_words(content: bytes) -> None:
    for read in (decode, parse, read_signer, bundle.read):
        try:
            read(content)
        except CryptoError:
            continue
    text = content.decode("utf-8", "surrogateescape")
    with TemporaryDirectory() as folder:
        for check in (
            lambda: verify(text, "korora/alpha", ALPHA.verify_key),
            lambda: PeerHeads(Path(folder)).check("alpha", ALPHA.verify_key, text),
            lambda: bundle.verify(content, lambda carried: Trust(carried=carried)),
        ):
            try:
                check()
            except CryptoError:
                continue
