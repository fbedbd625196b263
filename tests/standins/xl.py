#!/usr/bin/env python3
"""A stand-in for Xen's xl: what xl 4.17 says, waits for and leaves behind, without Xen.

It follows tools/xl/xl_migrate.c, xl_vmcontrol.c and xl_info.c of RELEASE-4.17.5, and what real xl was seen to do when
its channel was cut. It imports nothing but the standard library, so that it starts in some 30 ms.

Sub-commands::

    xl list [-v] [-l] [DOMAIN]      xl rename DOMAIN NAME      xl pause | unpause | destroy DOMAIN
    xl migrate-receive [-e] [-d] [-p]
    xl migrate [-e] [-p] [--debug] -s "" DOMAIN COMMAND

The host is a folder, $XL_STANDIN_HOST; tests/standins/xen_host.py makes one and looks into it:

    state.json      its domains, changed only under a lock on the file lock
    streams/ID      what a domain is when it is sent away: a stream as xl writes it, from the first byte to before GO
    faults.json     what is to go wrong, and when: {STEP: [ACTION, TIMES]}
    log             a line for each command, and for each step that it reaches: "PID COMMAND words"
    runs            a line whenever a domain begins or ceases to run: "NANOSECONDS UUID ID +" or "… -", CLOCK_MONOTONIC

Steps, in the order in which they are reached; STEP@NAME is that of one domain alone:

    list, rename, pause, unpause, destroy    of the commands with these names, before they act
    receive:banner   before it is written        migrate:banner     it has been read
    receive:create   NAME--incoming is made next migrate:stream     half of the live part is written
    receive:stream   NAME--incoming is there     migrate:suspended  before the rest of the stream is written
    receive:ready    before READY is written     migrate:ready      READY has been read
    receive:go       GO has been read            migrate:renamed    it is NAME--migratedaway; GO is written next
    receive:renamed  it is NAME                  migrate:go         GO has been written
    receive:report   before REPORT is written    migrate:report     REPORT and its status have been read
    receive:destroy  before its copy goes        migrate:destroy    before its copy goes
                                                 migrate:resume     before its copy runs again
                                                 migrate:resumed    and thereafter

Actions: ``die`` (SIGKILL), ``hang`` (until it is killed), ``hold`` (until the fault is taken away; both for two
minutes at most), ``fail`` (what
libxl does at this step goes wrong), ``lie`` (of a command: end with 0 and do nothing, as ``xl unpause`` may).

What a domain's monitor does is not played: state.json says whether it has one, and one that was suspended has lost it.
"""

import fcntl
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

BANNER = b"xl migration receiver ready, send binary domain data.\n"
READY = b"domain received, ready to unpause\0"
GO = b"domain is yours, you are cleared to unpause\0"
REPORT = b"my copy unpause results are as follows\0"
MAGIC = b"Xen saved domain, xl format\n \0 \r"

HOST = Path(os.environ.get("XL_STANDIN_HOST", "/nonexistent"))  # tests import the words below
HANG_SECONDS_MAX = 120.0  # of a fault that nobody takes away: longer than any test
HOLD_POLL_SECONDS = 0.005
CHILD_SECONDS_MAX = 2.0  # migration_child_report
DESTROY_SECONDS = 0.1  # the real one takes 0.1 to 0.25
PIECE_BYTES = 65536
SUSPENDED_BYTES = 4096  # of a stream's end, sent while the domain is suspended
REASONS = {"poweroff": (0, "-"), "reboot": (1, "r"), "suspend": (2, "s"), "crash": (3, "c")}
ERROR_INVAL = 6
ERROR_FAIL = 3
UNEXPECTED = 255  # migrate_read_fixedmessage says 1, and -1 is what fits into the status


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def log(words: str) -> None:
    with (HOST / "log").open("a") as file:
        file.write(f"{os.getpid()} {words}\n")


def fail(words: str, status: int = 1) -> NoReturn:
    say(words)
    log(f"exit {status}")
    os._exit(status)


def end(status: int) -> NoReturn:
    log(f"exit {status}")
    os._exit(status)


# ---------------------------------------------------------------------- the host


def running(state: dict[str, Any]) -> set[tuple[str, int]]:
    return {(domain["uuid"], domain["id"]) for domain in state["domains"] if runs(domain)}


def note_runs(host: Path, before: set[tuple[str, int]], after: set[tuple[str, int]]) -> None:
    """Say in the file `runs` what has changed; the host's lock is held."""
    changes = [(who, "-") for who in before - after] + [(who, "+") for who in after - before]
    if changes:
        with (host / "runs").open("a") as file:
            file.writelines(f"{time.monotonic_ns()} {uuid} {number} {sign}\n" for (uuid, number), sign in changes)


@contextmanager
def locked(*, change: bool = True) -> Iterator[dict[str, Any]]:
    """The host's state; what is changed is written back."""
    with (HOST / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads((HOST / "state.json").read_text())
        before = running(state)
        yield state
        if change:
            note_runs(HOST, before, running(state))
            new = HOST / "state.json.new"
            new.write_text(json.dumps(state, indent=1))
            new.replace(HOST / "state.json")


def reach(step: str, name: str = "") -> str:
    """Say that a step is reached, by the domain of that name, and let go wrong what is to go wrong there."""
    log(f"step {step}")
    with (HOST / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        faults = json.loads((HOST / "faults.json").read_text())
        if f"{step}@{name}" in faults:
            step = f"{step}@{name}"
            log(f"step {step}")
        action, times = faults.get(step, ("", 0))
        if times and action != "hold":
            faults[step] = (action, times - 1)
            (HOST / "faults.json").write_text(json.dumps(faults))
    if not times:
        return ""
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        time.sleep(HANG_SECONDS_MAX)
        end(1)
    until = time.monotonic() + HANG_SECONDS_MAX
    while action == "hold":
        time.sleep(HOLD_POLL_SECONDS)
        if step not in json.loads((HOST / "faults.json").read_text()):
            return ""
        if time.monotonic() > until:
            end(1)
    return str(action)


def runs(domain: dict[str, Any]) -> bool:
    return not domain["paused"] and domain["shutdown"] is None


def cpu_seconds(domain: dict[str, Any]) -> float:
    """What it has run: it goes on only while it runs."""
    return float(domain["ran"] + (time.time() - domain["since"] if runs(domain) else 0))


def change(domain: dict[str, Any], *, paused: bool, shutdown: str | None) -> None:
    domain["ran"], domain["since"] = cpu_seconds(domain), time.time()
    domain["paused"], domain["shutdown"] = paused, shutdown


def found(state: dict[str, Any], qualifier: str) -> dict[str, Any]:
    """What find_domain() finds: digits are an id, whatever there is of that name."""
    for domain in state["domains"]:
        if str(domain["id"]) == qualifier if qualifier.isdigit() else domain["name"] == qualifier:
            assert isinstance(domain, dict)
            return domain
    fail(f"{qualifier} is an invalid domain identifier (rc=-6)")


def by_id(state: dict[str, Any], number: int) -> dict[str, Any]:
    return found(state, str(number))


def renamed(state: dict[str, Any], domain: dict[str, Any], name: str) -> bool:
    """libxl_domain_rename: no two have one name."""
    if any(other["name"] == name and other is not domain for other in state["domains"]):
        say(f'libxl: error: Domain with name "{name}" already exists.')
        return False
    domain["name"] = name
    return True


def gone(number: int) -> None:
    time.sleep(DESTROY_SECONDS)
    with locked() as state:
        state["domains"] = [domain for domain in state["domains"] if domain["id"] != number]
    log(f"destroyed {number}")


# ---------------------------------------------------------------------- plain commands


def letters(domain: dict[str, Any]) -> str:
    reason = "-" if domain["shutdown"] is None else REASONS[domain["shutdown"]][1]
    blocked = "b" if runs(domain) and domain["id"] else "-"
    running = "r" if runs(domain) and not domain["id"] else "-"
    return "".join(
        (
            running,
            blocked,
            "p" if domain["paused"] else "-",
            "s" if domain["shutdown"] is not None else "-",
            reason,
            "-",
        )
    )


def list_domains(arguments: list[str]) -> None:
    flags = {word for word in arguments if word.startswith("-")}
    named = [word for word in arguments if not word.startswith("-")]
    with locked(change=False) as state:
        domains = [found(state, named[0])] if named else state["domains"]
    if "-l" in flags:
        shown = [{"domid": domain["id"], "config": domain["config"]} for domain in domains]
        print(json.dumps(shown, indent=4))
        return
    verbose = "-v" in flags
    head = "Name                                        ID   Mem VCPUs\tState\tTime(s)"
    print(head + ("   UUID                            Reason-Code\tSecurity Label" if verbose else ""))
    for domain in domains:
        line = (
            f"{domain['name']:<40} {domain['id']:5d} {domain['memory']:5d} {domain['vcpus']:5d}     {letters(domain)}"
            f"  {cpu_seconds(domain):8.1f}"
        )
        if verbose:
            reason = "-" if domain["shutdown"] is None else f"{REASONS[domain['shutdown']][0]:x}"
            line += f" {domain['uuid']} {reason:>8} {'-':>16}"
        print(line)


def change_one(command: str, arguments: list[str]) -> None:
    with locked(change=False) as state:
        name = found(state, arguments[0])["name"]
    action = reach(command, name)
    if action == "lie":
        return
    with locked() as state:
        domain = found(state, arguments[0])
        if action == "fail":
            fail(f"libxl: error: {command} of domain {domain['id']} failed")
        match command:
            case "rename":
                if not renamed(state, domain, arguments[1]):
                    fail(f"Can't rename domain '{arguments[0]}'.")
                log(f"renamed {domain['id']} to {arguments[1]}")
            case "pause":
                change(domain, paused=True, shutdown=domain["shutdown"])
            case "unpause" if domain["paused"]:
                change(domain, paused=False, shutdown=domain["shutdown"])
                log(f"unpaused {domain['id']}")
            case "unpause":
                # It says so, and ends with 0.
                say(f"libxl: error: Domain {domain['id']}:Unpausing domain: Invalid argument")
    if command == "destroy":
        gone(domain["id"])


# ---------------------------------------------------------------------- migrate-receive


class Stream:
    """Standard input, read exactly as far as a stream goes."""

    def __init__(self) -> None:
        self.kept = bytearray()

    def exactly(self, count: int) -> bytes:
        """Raises EOFError where it ends before that, OSError where it breaks."""
        got = bytearray()
        while len(got) < count:
            piece = os.read(0, min(PIECE_BYTES, count - len(got)))
            if not piece:
                raise EOFError
            got += piece
        self.kept += got
        return bytes(got)

    def xl_header(self) -> dict[str, Any]:
        """The domain's configuration (xl.h, struct save_file_header)."""
        head = self.exactly(48)
        if not head.startswith(MAGIC):
            raise ValueError("File has wrong magic number - corrupt or for a different tool?")
        sized = self.exactly(struct.unpack_from("<I", head, 44)[0])
        config: dict[str, Any] = json.loads(sized[4 : 4 + struct.unpack_from("<I", sized)[0]].rstrip(b"\0"))
        return config

    def libxl(self) -> None:
        """The rest, to libxl's END (docs/specs/libxl-migration-stream.pandoc)."""
        if not self.exactly(16).startswith(b"LibxlFmt"):
            raise ValueError("invalid ident")
        while True:
            kind, length = struct.unpack("<II", self.exactly(8))
            if kind == 0:
                return
            if kind == 1:
                self._libxc()
            else:
                self.exactly(length + -length % 8)

    def _libxc(self) -> None:
        """An inline image, to its END (docs/specs/libxc-migration-stream.pandoc)."""
        if self.exactly(24)[8:12] != b"XENF":
            raise ValueError("invalid libxc image")
        self.exactly(16)
        while True:
            kind, length = struct.unpack("<II", self.exactly(8))
            if kind == 0:
                return
            self.exactly(length + -length % 8)


def write(fd: int, data: bytes) -> bool:
    """libxl_write_exactly with SIGPIPE ignored: whether all of it went."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view[:PIECE_BYTES]) :]
    except OSError:
        return False
    return True


def read_message(fd: int, words: bytes) -> bool:
    """migrate_read_fixedmessage."""
    got = bytearray()
    try:
        while len(got) < len(words):
            piece = os.read(fd, len(words) - len(got))
            if not piece:
                say("libxl: error: unexpected end of file on the migration stream")
                return False
            got += piece
    except OSError as error:
        say(f"libxl: error: {error.strerror}")
        return False
    if got != words:
        say("migration stream contained unexpected data")
        return False
    return True


def made(config: dict[str, Any], *, monitor: bool) -> int:
    """create_domain, up to where pages are read: paused, and called NAME--incoming."""
    info = config["c_info"]
    name = f"{info['name']}--incoming"
    action = reach("receive:create", info["name"])
    with locked() as state:
        if action == "fail" or any(other["name"] == name for other in state["domains"]):
            fail("migration target: Domain creation failed (code -3).")
        number = state["next_id"]
        state["next_id"] += 1
        state["domains"].append(
            {
                "id": number,
                "name": name,
                "uuid": info["uuid"],
                "memory": 96,
                "vcpus": 1,
                "paused": True,
                "shutdown": None,
                "ran": 0.0,
                "since": time.time(),
                "monitor": monitor,
                "config": config,
            }
        )
    log(f"created {number} {name}")
    return int(number)


def receive(arguments: list[str]) -> None:
    say("migration target: Ready to receive domain.")
    reach("receive:banner")
    if not write(1, BANNER):
        end(ERROR_FAIL)
    stream = Stream()
    number = None
    try:
        config = stream.xl_header()
        number = made(config, monitor="-e" not in arguments)
        if reach("receive:stream", config["c_info"]["name"]) == "fail":
            raise ValueError("restore failed")
        stream.libxl()
    except (EOFError, OSError, ValueError, KeyError, struct.error) as error:
        # create_domain destroys what it has made; nothing but the exit code tells the other side.
        if number is not None:
            gone(number)
        fail(f"libxl: error: {error!r}\nmigration target: Domain creation failed (code -3).")
    name = config["c_info"]["name"]
    (HOST / "streams" / str(number)).write_bytes(stream.kept)
    log(f"received {number} {len(stream.kept)} {hashlib.sha256(stream.kept).hexdigest()}")
    say("migration target: Transfer complete, requesting permission to start domain.")
    reach("receive:ready", name)
    if not write(1, READY):
        end(1)  # NAME--incoming stays
    status = _take(number, name, arguments)
    reach("receive:report", name)
    if not (write(1, REPORT) and write(1, bytes([status]))):
        end(1)  # the domain stays as it is
    if status:
        say("migration target: Failure, destroying our copy.")
        if reach("receive:destroy", name) == "fail":
            fail("migration target: Failed to destroy our copy (code -3).")
        gone(number)
        say("migration target: Cleanup OK, granting sender permission to resume.")
        if not write(1, GO):
            end(1)
    end(0)


def _take(number: int, name: str, arguments: list[str]) -> int:
    """Wait for GO, rename, start: the status that is reported."""
    if not read_message(0, GO):
        return UNEXPECTED
    action = reach("receive:go", name)
    say("migration target: Got permission, starting domain.")
    with locked() as state:
        if action == "fail" or not renamed(state, by_id(state, number), name):
            return ERROR_INVAL
    log(f"renamed {number} to {name}")
    action = reach("receive:renamed", name)
    if "-p" not in arguments:
        if action == "fail":
            return ERROR_FAIL
        with locked() as state:
            domain = by_id(state, number)
            change(domain, paused=False, shutdown=None)
        log(f"unpaused {number}")
    say("migration target: Domain started successsfully.")
    return 0


# ---------------------------------------------------------------------- migrate


class Sender:
    """migrate_domain: the domain, and the transport's pipes."""

    def __init__(self, number: int, name: str, command: str) -> None:
        self.number, self.name = number, name
        self.child = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.out, self.into = self.child.stdin.fileno(), self.child.stdout.fileno()

    def hang_up(self) -> None:
        """Close what the transport reads, and wait a little for its end (migration_child_report)."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        try:
            status = self.child.wait(CHILD_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            say("migration child not exiting, no longer waiting (exit status will be unreported)")
        else:
            if status:
                say(f"libxl: info: migration transport process [{self.child.pid}] exited with error status {status}")

    def resume(self) -> None:
        reach("migrate:resume", self.name)
        if self.ended():
            say(f"libxl: error: Domain {self.number}:xc_domain_resume failed: Invalid argument")
            return
        with locked() as state:
            domain = by_id(state, self.number)
            change(domain, paused=domain["paused"], shutdown=None)
        log(f"resumed {self.number}")
        reach("migrate:resumed", self.name)

    def turn_back(self) -> NoReturn:
        """failed_resume"""
        self.hang_up()
        say("Migration failed, resuming at sender.")
        self.resume()
        end(1)

    def give_up(self) -> NoReturn:
        """failed_badly"""
        say("** Migration failed during final handshake **\nDomain state is now undefined !")
        self.hang_up()
        end(1)

    def ended(self) -> bool:
        """Whether the guest has shut down by itself: it is not suspended then, nor ever resumed (xg_resume.c)."""
        with locked(change=False) as state:
            mine = [domain for domain in state["domains"] if domain["id"] == self.number]
        return not mine or mine[0]["shutdown"] not in {None, "suspend"}

    def rename(self, name: str) -> bool:
        with locked() as state:
            return renamed(state, by_id(state, self.number), name)

    def send(self, stream: bytes) -> None:
        live = max(len(stream) - SUSPENDED_BYTES, 0)
        if not write(self.out, stream[: live // 2]):
            self.turn_back()
        reach("migrate:stream", self.name)
        if not write(self.out, stream[live // 2 : live]):
            self.turn_back()
        if self.ended():
            say("libxl: error: guest we were suspending has shut down\nmigration sender: libxl_domain_suspend failed")
            self.turn_back()
        with locked() as state:
            domain = by_id(state, self.number)
            change(domain, paused=domain["paused"], shutdown="suspend")
            domain["monitor"] = False  # it has seen its domain suspended, and ended
        log(f"suspended {self.number}")
        reach("migrate:suspended", self.name)
        if not write(self.out, stream[live:]):
            self.turn_back()

    def hand_over(self) -> NoReturn:
        if not read_message(self.into, READY):
            self.turn_back()
        reach("migrate:ready", self.name)
        say("migration sender: Target has acknowledged transfer.")
        away = f"{self.name}--migratedaway"
        if not self.rename(away):
            self.turn_back()
        log(f"renamed {self.number} to {away}")
        reach("migrate:renamed", self.name)
        say("migration sender: Giving target permission to start.")
        if not write(self.out, GO):
            self.give_up()
        reach("migrate:go", self.name)
        if not read_message(self.into, REPORT):
            self.give_up()
        try:
            status = os.read(self.into, 1)
        except OSError:
            status = b""
        if not status:
            self.give_up()
        reach("migrate:report", self.name)
        if status != b"\0":
            say(f"migration sender: Target reports startup failure (status code {status[0]}).")
            if not read_message(self.into, GO):
                self.give_up()
            say("migration sender: Trying to resume at our end.")
            self.rename(self.name)
            self.resume()
            say("migration sender: Resumed OK.\nMigration failed due to problems at target.")
            end(1)
        say("migration sender: Target reports successful startup.")
        reach("migrate:destroy", self.name)
        gone(self.number)
        say("Migration successful.")
        end(0)


def migrate(arguments: list[str]) -> None:
    words = [word for word in arguments if word not in {"-e", "-p", "--debug", "--live"}]
    if len(words) != 4 or words[:2] != ["-s", ""]:
        fail('the stand-in migrates with -s "" DOMAIN COMMAND only', 2)
    with locked(change=False) as state:
        domain = found(state, words[2])
    stream = (HOST / "streams" / str(domain["id"])).read_bytes()
    sender = Sender(domain["id"], domain["name"], words[3])
    if not read_message(sender.into, BANNER):
        sender.hang_up()
        end(1)
    reach("migrate:banner", sender.name)
    sender.send(stream)
    sender.hand_over()


def main() -> None:
    command, *arguments = sys.argv[1:]
    log(" ".join([command, *(re.sub(r"\s+", " ", word) for word in arguments)]))
    match command:
        case "list":
            if reach("list") == "fail":
                fail("libxl_list_domain failed.")
            list_domains(arguments)
        case "rename" | "pause" | "unpause" | "destroy":
            change_one(command, arguments)
        case "migrate-receive":
            receive(arguments)
        case "migrate":
            migrate(arguments)
        case _:
            fail(f"command {command} is unknown", 1)


if __name__ == "__main__":
    main()
