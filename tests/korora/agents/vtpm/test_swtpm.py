"""Every trap of a real swtpm that the agent must not step into; each was seen to be there."""

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from korora.agents.vtpm import ctrl
from korora.agents.vtpm.commands import Hierarchy
from korora.agents.vtpm.ctrl import Blob, StateBlob
from korora.agents.vtpm.rehearsal import Keys, rehearse
from korora.agents.vtpm.swtpm import Swtpm
from proxy.errors import VtpmFailed
from tests.korora.agents.vtpm.emulators import NOTHING, Emulator, emulators, key, keys, lived_in

__all__ = ["key"]


@pytest.fixture
def two(tmp_path: Path, key: Path) -> Iterator[tuple[Emulator, Emulator]]:
    """A vTPM that has been lived in, and an emulator that waits for one."""
    with emulators() as held:
        held += [Emulator(tmp_path / "a", key), Emulator(tmp_path / "b", key)]
        lived_in(held[0])
        yield held[0], held[1]


def test_all_of_it_moves(two: tuple[Emulator, Emulator]) -> None:
    source, destination = two
    with source.guest() as guest:
        before = guest.names(), guest.pcr(16), guest.pcr(10), guest.read_nv(10)
    destination.swtpm.load(source.swtpm.export())
    assert not destination.swtpm.running()  # it is given, and nobody's yet
    destination.swtpm.start()
    with destination.guest() as guest:
        assert (guest.names(), guest.pcr(16), guest.pcr(10), guest.read_nv(10)) == before


def test_no_export_without_a_migration_key(tmp_path: Path, key: Path) -> None:
    with emulators() as held:
        # --key alone seals what is on the disk, and exports in clear: it must not count as a key.
        held.append(Emulator(tmp_path / "a", None, options=("--key", f"file={key},mode=aes-256-cbc,format=binary")))
        lived_in(held[0])
        with pytest.raises(VtpmFailed, match="no migration key") as refused:
            held[0].swtpm.export()
        assert "--migration-key" in refused.value.remedy


def test_an_export_is_looked_at_and_not_believed(tmp_path: Path, key: Path) -> None:
    with emulators() as held:
        held.append(Emulator(tmp_path / "a", None))
        lived_in(held[0])
        asked = held[0].swtpm
        clear = ctrl.state_of(Blob.PERMANENT, asked._ask(ctrl.Command.GET_STATEBLOB, ctrl.get_state(Blob.PERMANENT)))
        with pytest.raises(VtpmFailed, match="not encrypted"):
            clear.require_sealed()
    with emulators() as held:
        short = tmp_path / "short.key"
        short.write_bytes(bytes(16))
        options = ("--migration-key", f"file={short},mode=aes-cbc,format=binary")
        held.append(Emulator(tmp_path / "b", None, options=options))
        lived_in(held[0])
        with pytest.raises(VtpmFailed, match="not encrypted"):  # AES-128
            held[0].swtpm.export()


def test_what_arrives_in_clear_is_not_loaded(tmp_path: Path, key: Path) -> None:
    with emulators() as held:
        held += [Emulator(tmp_path / "a", None), Emulator(tmp_path / "b", key)]
        lived_in(held[0])
        clear = tuple(
            ctrl.state_of(blob, held[0].swtpm._ask(ctrl.Command.GET_STATEBLOB, ctrl.get_state(blob))) for blob in Blob
        )
        with pytest.raises(VtpmFailed, match="not encrypted"):
            held[1].swtpm.load(clear)


def test_permanent_without_volatile_is_refused(two: tuple[Emulator, Emulator]) -> None:
    source, destination = two
    permanent, volatile = source.swtpm.export()
    for parts in ((permanent,), (volatile,), (volatile, permanent), (permanent, permanent), ()):
        with pytest.raises(VtpmFailed, match="not both parts"):
            destination.swtpm.load(parts)


def test_swtpm_itself_takes_permanent_alone_and_loses_the_pcrs(two: tuple[Emulator, Emulator]) -> None:
    source, destination = two
    with source.guest() as guest:
        identity, run = guest.names()
    permanent, _ = source.swtpm.export()
    destination.swtpm._ask(ctrl.Command.SET_STATEBLOB, ctrl.set_state(permanent))
    destination.swtpm.start()  # no error: this is why `load` and the identity keys look for themselves
    with destination.guest() as guest:
        guest.startup()
        assert guest.pcr(16) == NOTHING
        assert guest.names()[0] == identity  # the endorsement key does not tell
        assert guest.names()[1] != run  # the null key does


@pytest.mark.parametrize("part", [0, 1])
def test_a_rejected_part_is_told_and_nothing_comes_up(two: tuple[Emulator, Emulator], part: int) -> None:
    """Left alone, the emulator would take INIT even so, and have a TPM that is new: nobody would notice."""
    source, destination = two
    blobs = list(source.swtpm.export())
    blobs[part] = replace(blobs[part], data=blobs[part].data[:-1] + bytes([blobs[part].data[-1] ^ 1]))
    with pytest.raises(VtpmFailed, match="refuses SET_STATEBLOB: what is encrypted was altered"):
        destination.swtpm.load(tuple(blobs))
    assert not destination.swtpm.listens
    assert destination.process.wait(5) == 0
    assert destination.files() == []


def test_swtpm_itself_starts_after_a_rejected_part(two: tuple[Emulator, Emulator]) -> None:
    _, destination = two
    with pytest.raises(VtpmFailed, match="refuses SET_STATEBLOB"):
        destination.swtpm._ask(
            ctrl.Command.SET_STATEBLOB, ctrl.set_state(StateBlob(Blob.PERMANENT, 0, b"not a vTPM's state"))
        )
    destination.swtpm.start()
    assert destination.swtpm.running()


def test_wrong_flags_are_told(two: tuple[Emulator, Emulator]) -> None:
    source, destination = two
    permanent, volatile = source.swtpm.export()
    with pytest.raises(VtpmFailed, match="it lacks the key") as refused:
        destination.swtpm.load((replace(permanent, flags=permanent.flags ^ ctrl.StateFlag.ENCRYPTED), volatile))
    assert refused.value.remedy == ctrl.KEY_REMEDY


def test_flags_go_back_as_they_came(tmp_path: Path, key: Path) -> None:
    """Where emulators seal what they store, GET says so, and a SET without it would be refused or misread."""
    options = ("--key", f"file={key},mode=aes-256-cbc,format=binary")
    with emulators() as held:
        held += [Emulator(tmp_path / "a", key, options=options), Emulator(tmp_path / "b", key, options=options)]
        lived_in(held[0])
        with held[0].guest() as guest:
            names = guest.names()
        blobs = held[0].swtpm.export()
        assert [blob.flags for blob in blobs] == [ctrl.StateFlag.ENCRYPTED, ctrl.StateFlag.ENCRYPTED]
        same = Keys(keys(key).migration, f"file={key},mode=aes-256-cbc,format=binary")
        assert tuple(quote.public for quote in rehearse(blobs, same, NOTHING).quotes) == names
        held[1].swtpm.load(blobs)
        held[1].swtpm.start()
        with held[1].guest() as guest:
            assert guest.names() == names


def test_another_migration_key_is_told(tmp_path: Path, key: Path, two: tuple[Emulator, Emulator]) -> None:
    other = tmp_path / "other.key"
    other.write_bytes(bytes(32))
    with emulators() as held:
        held.append(Emulator(tmp_path / "other", other))
        with pytest.raises(VtpmFailed, match="under another key"):
            held[0].swtpm.load(two[0].swtpm.export())


def test_a_running_vtpm_is_not_overwritten(two: tuple[Emulator, Emulator]) -> None:
    source, destination = two
    lived_in(destination)
    with pytest.raises(VtpmFailed, match="is running, so it is somebody's"):
        destination.swtpm.load(source.swtpm.export())


def test_only_its_end_makes_it_forget_what_it_was_given(two: tuple[Emulator, Emulator]) -> None:
    source, destination = two
    with source.guest() as guest:
        names = guest.names()
    destination.swtpm.load(source.swtpm.export())
    destination.swtpm.stop()
    destination.swtpm.start()
    with destination.guest() as guest:
        assert guest.names() == names  # STOP does not
    destination.swtpm.stop()
    destination.swtpm.end()
    assert destination.process.wait(5) == 0


def test_reading_the_volatile_state_removes_what_is_stored_of_it(two: tuple[Emulator, Emulator]) -> None:
    source, _ = two
    source.swtpm.store()
    assert "tpm2-00.volatilestate" in source.files()
    source.swtpm.export()
    assert "tpm2-00.volatilestate" not in source.files()  # so `store` has to come after `export`
    source.swtpm.store()
    with source.guest() as guest:
        names, pcr = guest.names(), guest.pcr(16)
        source.swtpm.stop()
        assert guest.code() != 0
        source.swtpm.start(ctrl.INIT_DELETE_VOLATILE)
        assert (guest.names(), guest.pcr(16)) == (names, pcr)
    assert "tpm2-00.volatilestate" not in source.files()  # a later start must not go back to it


def test_ending_it_writes_nothing_behind_us(two: tuple[Emulator, Emulator]) -> None:
    source, _ = two
    source.swtpm.export()
    source.swtpm.end()
    assert source.process.wait(5) == 0
    assert not source.swtpm.listens
    source.swtpm.end()  # again: nothing


def test_somebody_else_at_the_control_channel_is_told(
    two: tuple[Emulator, Emulator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("korora.agents.vtpm.swtpm.ANSWER_SECONDS_MAX", 0.2)
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.connect(str(two[0].control))
        qemu.sendall(ctrl.request(ctrl.Command.GET_CONFIG))
        assert len(qemu.recv(8)) == 8
        with pytest.raises(VtpmFailed, match="somebody else has its channel"):
            two[0].swtpm.running()


def test_an_emulator_that_is_not_there(tmp_path: Path) -> None:
    absent = Swtpm(tmp_path / "c")
    assert not absent.listens
    with pytest.raises(VtpmFailed, match="cannot be asked") as failed:
        absent.running()
    assert "see that it runs" in failed.value.remedy


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"\0\0\0", "closed the connection"),
        (struct.pack(">IIII", 0, 0, 1 << 30, 1 << 30), "bytes of state, 524288 allowed"),
        (struct.pack(">IIII", 0, 0, 8, 4) + b"half", "4 of 8 bytes"),
        (struct.pack(">IIII", 0, 0, 0, 0), "0 of 0 bytes"),
    ],
)
def test_an_emulator_that_lies(tmp_path: Path, answer: bytes, what: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c"))
        listener.listen()
        child = os.fork()
        if not child:
            for reply in (struct.pack(">II", 0, 2), answer):
                served, _ = listener.accept()
                served.recv(64)
                served.sendall(reply)
                served.close()
            os._exit(0)
        try:
            with pytest.raises(VtpmFailed, match=what):
                Swtpm(tmp_path / "c").export()
        finally:
            os.waitpid(child, 0)


# ---- rehearsals


def test_a_rehearsal_says_who_it_is_and_leaves_the_original_alone(two: tuple[Emulator, Emulator], key: Path) -> None:
    source, _ = two
    with source.guest() as guest:
        names, pcr = guest.names(), guest.pcr(16)
        loaded = [guest.primary() for _ in range(3)]  # every slot for transient objects is taken
        blobs = source.swtpm.export()
        told = rehearse(blobs, keys(key), b"q" * 32)
        assert tuple(quote.public for quote in told.quotes) == names
        assert told.pcrs[16] == pcr
        assert told.pcrs[0] == NOTHING
        assert all(b"q" * 32 in quote.quote for quote in told.quotes)
        for handle in loaded:  # the guest's own are still there
            guest.send(0x165, struct.pack(">I", handle))


def test_a_guest_that_owns_the_endorsement_seed_is_known_by_its_run(two: tuple[Emulator, Emulator], key: Path) -> None:
    source, _ = two
    with source.guest() as guest:
        names = guest.names()
        guest.set_endorsement_password(b"the guest's own")
    told = rehearse(source.swtpm.export(), keys(key), NOTHING)
    assert [(quote.hierarchy, quote.public) for quote in told.quotes] == [(Hierarchy.NULL, names[1])]


def test_a_rehearsal_ends_with_its_process(two: tuple[Emulator, Emulator], key: Path, tmp_path: Path) -> None:
    """Killed in the middle of it, the destination must not be left with a second vTPM that answers."""
    blobs = [(blob.type.value, blob.flags, blob.data) for blob in two[0].swtpm.export()]
    program = (
        "import os, sys\n"
        "from korora.agents.vtpm.ctrl import Blob, StateBlob\n"
        "from korora.agents.vtpm.rehearsal import Keys, emulator\n"
        f"blobs = tuple(StateBlob(Blob(t), f, d) for t, f, d in {blobs!r})\n"
        f"with emulator(Keys({keys(key).migration!r}), own_key=True) as (control, tpm):\n"
        "    control.load(blobs); control.start()\n"
        "    print(control.running(), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=False)
    assert ran.stdout == b"True\n"
    deadline = time.monotonic() + 5
    while any(str(key) in _arguments(pid) and "clientfd" in _arguments(pid) for pid in os.listdir("/proc")):
        assert time.monotonic() < deadline, "the rehearsal's emulator outlives its process"
        time.sleep(0.01)


def _arguments(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (OSError, UnicodeDecodeError):
        return ""


def test_a_blob_that_is_none() -> None:
    for data in (b"", b"\0" * 7, b"\2\1\0\x0a\0\x16\0\0\0\x0b", b"\2\1\0\x0b\0\x16\0\0\0\x0a"):
        with pytest.raises(VtpmFailed, match="no blob of swtpm's"):
            StateBlob(Blob.PERMANENT, 0, data).require_sealed()
    with pytest.raises(VtpmFailed, match="524289 bytes, 524288 allowed"):
        ctrl.set_state(StateBlob(Blob.PERMANENT, 0, bytes(ctrl.BLOB_BYTES_MAX + 1)))
