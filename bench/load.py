"""The load at both ends of a relay under test: source, sink, echo, ping and set-up probes.

Each role is one small process, the same for every peer, so that what differs between two figures is the relay. The
parent (`bench.measure`) speaks to it in lines: a role prints one JSON object a line, and where it must wait (to start,
or before it closes its socket and so ends the relays) it waits for a line on standard input.

    python -m bench.load sink   --bytes N [--count C]   accept C streams of N bytes each, say when the last byte arrived
    python -m bench.load source --to HOST:PORT --bytes N [--prime P]
    python -m bench.load echo                           send back whatever arrives, on any number of connections
    python -m bench.load ping   --to HOST:PORT --count N
    python -m bench.load setup  --to HOST:PORT --count N
    python -m bench.load launch --port P -- COMMAND     run COMMAND once per connection, the socket its input and output

With --prime the source sends P of its bytes, says so, and waits for a further line before the rest: so that handshakes
are over before anything is timed.

The source writes a block of random bytes over and over: incompressible, and far larger than any relay's buffers. The
sink receives into one buffer and looks at nothing. Neither uses tricks (sendfile, MSG_TRUNC, MSG_ZEROCOPY) that no
hypervisor would: the bytes are really written and really read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

MiB = 1024 * 1024

SOURCE_BLOCK_BYTES = 64 * MiB  # far beyond the L2 cache and every relay's buffers, so no relay sees warm repeats
SEND_BYTES = 1 * MiB  # one send(2) offers this much
RECV_BYTES = 1 * MiB  # one recv(2) takes at most this much
CONNECT_TIMEOUT_S = 10.0
PING_WARMUP = 200  # pings sent before the first one that counts
ECHO_CONNECTIONS_MAX = 4096
SESSION_END_PATIENCE_S = 2.0  # for a relay to pass our end on and the echo's back
SESSION_GAP_S = 0.05  # between sessions, for the relays to finish the last one's bookkeeping


def say(**fields: object) -> None:
    """Print one JSON line to the parent, at once."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def await_line() -> None:
    """Wait until the parent writes a line, or goes away."""
    sys.stdin.readline()


def connect(address: str) -> socket.socket:
    """Connect to HOST:PORT with Nagle's algorithm off."""
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S)
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def listen() -> socket.socket:
    """Listen on an ephemeral loopback port and tell the parent which."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    say(event="listening", port=listener.getsockname()[1])
    return listener


def _drain(sock: socket.socket, expected_bytes: int) -> tuple[int, int]:
    """Receive until `expected_bytes` have come or the stream ends; bytes, and when the first came in nanoseconds."""
    buffer = memoryview(bytearray(RECV_BYTES))
    total = 0
    first_ns = 0
    while total < expected_bytes:
        count = sock.recv_into(buffer)
        if count == 0:
            break
        if total == 0:
            first_ns = time.monotonic_ns()
        total += count
    return total, first_ns


def run_sink(expected_bytes: int, streams: int) -> None:
    """Take the streams; say when the last byte arrived; close only when told, so that the relays can be sampled."""
    listener = listen()
    socks: list[socket.socket] = []
    threads: list[threading.Thread] = []
    counted: list[tuple[int, int]] = []

    def drain(sock: socket.socket) -> None:
        # A stream that broke is short, which the parent sees.
        with contextlib.suppress(OSError):
            counted.append(_drain(sock, expected_bytes))

    for _ in range(streams):
        sock, _peer = listener.accept()
        socks.append(sock)
        threads.append(threading.Thread(target=drain, args=(sock,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    say(
        event="received",
        bytes=sum(total for total, _ in counted),
        first_ns=min((first for _, first in counted), default=0),
        last_ns=time.monotonic_ns(),
        cpu_s=time.process_time(),
    )
    await_line()
    for sock in socks:
        sock.close()
    listener.close()


def run_source(address: str, total_bytes: int, prime_bytes: int) -> None:
    """Make the block, wait for the word, connect, send the stream, and hold the connection open until told."""
    block = memoryview(os.urandom(SOURCE_BLOCK_BYTES))
    pieces = [block[at : at + SEND_BYTES] for at in range(0, SOURCE_BLOCK_BYTES, SEND_BYTES)]
    say(event="filled")
    await_line()
    sock = connect(address)
    if prime_bytes:
        sock.sendall(block[:prime_bytes])
        say(event="primed", bytes=prime_bytes)
        await_line()
    cpu_start_s = time.process_time()
    start_ns = time.monotonic_ns()
    sent = prime_bytes
    index = 0
    while sent < total_bytes:
        piece = pieces[index]
        if total_bytes - sent < SEND_BYTES:
            piece = piece[: total_bytes - sent]
        sock.sendall(piece)
        sent += len(piece)
        index = (index + 1) % len(pieces)
    say(event="sent", bytes=sent, start_ns=start_ns, cpu_s=time.process_time() - cpu_start_s)
    await_line()
    sock.close()


def _echo_one(sock: socket.socket) -> None:
    """Send back what arrives until the other side has ended."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(64 * 1024))
    with sock:
        try:
            while count := sock.recv_into(buffer):
                sock.sendall(buffer[:count])
        except OSError:
            return  # a probe or a relay that closed hard: the parent judges, the echo only serves


def run_echo() -> None:
    """Echo on any number of connections until the parent closes our standard input."""
    listener = listen()

    def accept_all() -> None:
        for _ in range(ECHO_CONNECTIONS_MAX):
            try:
                sock, _peer = listener.accept()
            except OSError:
                return
            threading.Thread(target=_echo_one, args=(sock,), daemon=True).start()

    threading.Thread(target=accept_all, daemon=True).start()
    await_line()


def _round_trip(sock: socket.socket) -> None:
    """Send one byte and wait for it to come back; EOFError if the connection ended instead."""
    sock.sendall(b"k")
    if not sock.recv(1):
        raise EOFError("the connection ended before the byte came back")


def run_ping(address: str, count: int) -> None:
    """One connection, `count` one-byte round trips one after the other; says each in nanoseconds."""
    samples_ns: list[int] = []
    with connect(address) as sock:
        for _ in range(PING_WARMUP):
            _round_trip(sock)
        for _ in range(count):
            start_ns = time.perf_counter_ns()
            _round_trip(sock)
            samples_ns.append(time.perf_counter_ns() - start_ns)
        say(event="pinged", samples_ns=samples_ns)
        await_line()


def run_setup(address: str, count: int) -> None:
    """`count` fresh sessions one after the other: TCP connect to the first byte echoed back, in nanoseconds each.

    Each is ended from our side and its end awaited, so that the next does not meet (or join) it.
    """
    samples_ns: list[int] = []
    for _ in range(count):
        start_ns = time.perf_counter_ns()
        with connect(address) as sock:
            _round_trip(sock)
            samples_ns.append(time.perf_counter_ns() - start_ns)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(SESSION_END_PATIENCE_S)
            with contextlib.suppress(OSError):  # a relay without half-close, or one that resets: ended as well
                while sock.recv(RECV_BYTES):
                    pass
        time.sleep(SESSION_GAP_S)
    say(event="set-up", samples_ns=samples_ns)


def run_launch(port: int, command: Sequence[str]) -> None:
    """Run the command once per connection with the socket as its standard input and output, as inetd does."""
    with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
        for _ in range(ECHO_CONNECTIONS_MAX):
            sock, _peer = listener.accept()
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                subprocess.Popen(command, stdin=sock.fileno(), stdout=sock.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one role; the exit code is 0 unless the connection failed under it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("role", choices=("sink", "source", "echo", "ping", "setup", "launch"))
    parser.add_argument("--to", default="", metavar="HOST:PORT")
    parser.add_argument("--bytes", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--prime", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    words = list(sys.argv[1:] if argv is None else argv)
    command: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    options = parser.parse_args(words)
    try:
        if options.role == "sink":
            run_sink(options.bytes, options.count)
        elif options.role == "source":
            run_source(options.to, options.bytes, options.prime)
        elif options.role == "echo":
            run_echo()
        elif options.role == "ping":
            run_ping(options.to, options.count)
        elif options.role == "launch":
            run_launch(options.port, command)
        else:
            run_setup(options.to, options.count)
    except (OSError, EOFError) as error:
        say(event="failed", error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
