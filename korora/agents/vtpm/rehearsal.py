"""A vTPM brought up for a moment in an emulator of its own, to see which one it is, and that its state is whole.

Both sides do it with the state that moves: the source before it gives it, the destination before it may keep it. The
machine's own emulators stay as they are: the source's is not asked anything that could change it, the destination's has
no running TPM before the machine is its own. The emulator hangs on two connections of this process and has no name in
the file system, so nobody else can speak to it, and it ends with this process, however that ends.
"""

import fcntl
import os
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crypto.files import read_bounded
from korora.agents.vtpm import commands
from korora.agents.vtpm.commands import Hierarchy
from korora.agents.vtpm.ctrl import BLOB_BYTES_MAX, StateBlob, StateFlag
from korora.agents.vtpm.swtpm import Held, Tpm
from proxy.errors import VtpmFailed

END_SECONDS_MAX: Final = 2.0  # for the emulator to end once its connections have
STATE_BYTES_MAX: Final = 2 * BLOB_BYTES_MAX  # of a file: what it keeps is not more than what it gives, and is padded
LOCK: Final = ".lock"
_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it: nothing of this meets a disk
_UNAVAILABLE: Final = frozenset({0x185, 0x9A2, 0x98E})  # TPM_RC_HIERARCHY, BAD_AUTH and AUTH_FAIL of session 1


@dataclass(frozen=True, slots=True)
class Keys:
    """What an emulator needs to read a state, as swtpm's own options.

    Args:
        migration: of ``--migration-key``; empty where what is read is not encrypted.
        state: of ``--key``; empty where the emulators of this host have none.
    """

    migration: str = ""
    state: str = ""


@dataclass(frozen=True, slots=True)
class KeyQuote:
    """One identity key's quote over all SHA-256 PCRs.

    Args:
        hierarchy: of ``commands.Hierarchy``.
        public: TPMT_PUBLIC.
        quote: TPMS_ATTEST.
        signature: TPMT_SIGNATURE.
    """

    hierarchy: Hierarchy
    public: bytes
    quote: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What a vTPM said of itself: its quotes, and the values of its 24 PCRs, 32 bytes each."""

    quotes: tuple[KeyQuote, ...]
    pcrs: tuple[bytes, ...]


def rehearse(
    blobs: tuple[StateBlob, ...], keys: Keys, qualifying: bytes, *, off: bool = False, sealed: bool = True
) -> Rehearsed:
    """Bring that state up and let it quote.

    Args:
        blobs: its parts.
        keys: of this host's emulators.
        qualifying: to be quoted, 32 bytes.
        off: of a machine that is off: its permanent part alone.
        sealed: whether a state in clear is refused.

    Raises:
        VtpmFailed: it does not come up, or does not answer.
    """
    with emulator(keys, own_key=not any(blob.flags & StateFlag.ENCRYPTED for blob in blobs)) as (control, tpm):
        control.load(blobs, off=off, sealed=sealed)
        control.start()
        return ask(tpm, qualifying)


def stored(files: tuple[Path, ...], keys: Keys) -> tuple[StateBlob, ...]:
    """What an emulator that does not run has stored, read by a copy of it: both parts, or the permanent one alone.

    Args:
        files: where it stores the permanent part, and then the volatile one.
        keys: of this host's emulators.

    Raises:
        VtpmFailed: nothing is stored, it cannot be read, or an emulator has it.
    """
    state: dict[str, bytes] = {}
    with _unused(files[0].parent / LOCK):
        for path in files[:2]:
            try:
                state[path.name] = read_bounded(path, STATE_BYTES_MAX)[0]
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise VtpmFailed(f"cannot read {path}: {error}", "be root, or the user of the emulators") from None
    if files[0].name not in state:
        raise VtpmFailed(f"there is no vTPM at {files[0].parent}", "see whether its machine has one")
    with emulator(keys, own_key=False, state=state) as (control, _):
        control.start()
        return control.export(off=files[1].name not in state)


@contextmanager
def _unused(lock: Path) -> Iterator[None]:
    """No swtpm has brought that state up, whichever control channel it has (swtpm: src/swtpm/swtpm_nvstore_dir.c)."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # nobody ever has
        return
    except OSError as error:
        raise VtpmFailed(f"cannot open {lock}: {error.strerror}", "be root, or the user of the emulators") from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise VtpmFailed(
            f"a swtpm has the state at {lock.parent}, and does not run it at its control channel", "end that swtpm"
        ) from None
    finally:
        os.close(descriptor)


def ask(tpm: Tpm, qualifying: bytes) -> Rehearsed:
    """What a running TPM says of itself. Its transient objects are flushed: only to be asked of a rehearsal.

    One that no guest has started up yet is started here, and has no run of its own that the null seed could tell.

    Raises:
        VtpmFailed: it does not answer, or has no identity key that can be used.
    """
    hierarchies = tuple(Hierarchy)
    if tpm.ask(commands.transient_handles()).code == commands.NOT_STARTED:
        tpm.ask(commands.startup()).require("to start up")
        hierarchies = (Hierarchy.ENDORSEMENT,)
    for handle in commands.handles(tpm.ask(commands.transient_handles()).require("to tell its objects")):
        tpm.ask(commands.flush(handle)).require("to flush an object")
    pcrs = tuple(
        value
        for first in range(0, commands.PCRS, 8)
        for value in commands.digests(tpm.ask(commands.pcr_read(first)).require("to read its PCRs"))
    )
    quotes = []
    for hierarchy in hierarchies:
        made = tpm.ask(commands.create_primary(hierarchy))
        if hierarchy is Hierarchy.ENDORSEMENT and made.code in _UNAVAILABLE:
            continue  # its guest has set a password before the endorsement seed, or turned it off
        key, public = commands.created(made.require("an identity key"))
        said = commands.quoted(tpm.ask(commands.quote(key, qualifying)).require("a quote"))
        tpm.ask(commands.flush(key)).require("to flush a key")
        quotes.append(KeyQuote(hierarchy, public, *said))
    if not quotes:
        raise VtpmFailed(
            "the vTPM cannot be told from another: no guest has started it, and its endorsement seed has a password",
            "let the machine boot, then migrate it",
        )
    return Rehearsed(tuple(quotes), pcrs)


@contextmanager
def emulator(keys: Keys, *, own_key: bool, state: Mapping[str, bytes] = {}) -> Iterator[tuple[Held, Tpm]]:
    """A swtpm for as long as the context lasts; its TPM is not running yet.

    Args:
        keys: as configured.
        own_key: whether what it writes is sealed under a key that nobody has: the state is not under this host's.
        state: files that it finds in its folder.

    Raises:
        VtpmFailed: it cannot be started.
    """
    ours, theirs = socket.socketpair()
    data, their_data = socket.socketpair()
    with (
        tempfile.TemporaryDirectory(prefix="korora-vtpm-", dir=_MEMORY if _MEMORY.is_dir() else None) as folder,
        ours,
        data,
    ):
        try:
            for name, content in state.items():
                (Path(folder) / name).write_bytes(content)  # the folder is this user's alone
            process, key = _spawn(Path(folder), keys, theirs, their_data, own_key=own_key)
        except OSError as error:
            raise VtpmFailed(f"swtpm cannot be started: {error.strerror}", "install swtpm on this host") from None
        finally:
            theirs.close()
            their_data.close()
        try:
            if key is not None:
                os.close(key)
            yield Held(ours), Tpm(data)
        finally:
            ours.close()
            data.close()
            _reap(process)


def _spawn(
    folder: Path, keys: Keys, control: socket.socket, data: socket.socket, *, own_key: bool
) -> tuple["subprocess.Popen[bytes]", int | None]:
    sealed = keys.state
    reader: int | None = None
    passed = [control.fileno(), data.fileno()]
    if own_key:
        reader, writer = os.pipe()
        os.write(writer, secrets.token_bytes(32))
        os.close(writer)
        sealed = f"fd={reader},mode=aes-256-cbc,format=binary"
        passed.append(reader)
    try:
        process = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--terminate", "--tpmstate", f"dir={folder},mode=0600"),
                *("--ctrl", f"type=unixio,clientfd={control.fileno()}"),
                *("--fd", str(data.fileno())),
                *(("--migration-key", keys.migration) if keys.migration else ()),
                *(("--key", sealed) if sealed else ()),
            ],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except BaseException:
        if reader is not None:
            os.close(reader)
        raise
    return process, reader


def _reap(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(END_SECONDS_MAX / 20)  # it ends by itself: its connections are closed
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_SECONDS_MAX)
