"""Pipes that were handed over: ours are ours alone, and xl sees an end only where it shall."""

import os
import socket
import stat

import pytest

from proxy.endpoints.handed import HandedIngress, HandedPipes, take_over
from proxy.errors import ConfigurationError, HypervisorFailed


def closed(*fds: int) -> bool:
    for fd in fds:
        try:
            os.fstat(fd)
        except OSError:
            continue
        return False
    return True


def test_what_was_given_is_closed_and_taken_in_descriptions_of_our_own() -> None:
    """Whoever gave a pipe can make its description wait for ever, and ours not."""
    read, write = os.pipe()
    back, forth = os.pipe()
    held = os.dup(read)
    mine = take_over([read, forth])
    assert closed(read, forth)
    os.set_blocking(held, True)
    assert [os.get_blocking(fd) for fd in mine] == [False, False]
    assert stat.S_ISFIFO(os.fstat(mine[0]).st_mode)
    for fd in (*mine, write, back, held):
        os.close(fd)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_refused_is_closed(count: int) -> None:
    fds = [*os.pipe(), *os.pipe()]
    given, others = fds[:count], fds[count:]
    with pytest.raises(ConfigurationError, match=f"{count} descriptors instead of two"):
        take_over(given)
    assert closed(*given)
    for fd in others:
        os.close(fd)


def test_a_number_that_is_no_descriptor() -> None:
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(ConfigurationError, match="cannot be taken over: Bad file descriptor"):
        take_over([read, write])
    assert closed(read)


async def test_one_socket_both_ways() -> None:
    ours, theirs = socket.socketpair()
    words: list[bool] = []
    pipes = HandedPipes(*take_over([os.dup(ours.fileno()), os.dup(ours.fileno())]), let_go=words.append)
    theirs.sendall(b"forward")
    buffer = memoryview(bytearray(100))
    assert pipes.read_into(buffer) == 7
    assert pipes.read_into(buffer) is None, "and does not wait"
    assert pipes.write(memoryview(b"back")) == 4
    pipes.finish()
    assert (theirs.recv(100), theirs.recv(100)) == (b"back", b""), "half-closed, although another has it"
    await pipes.settle()
    assert words == [True, False]
    ours.close()
    theirs.close()


async def test_what_is_left_is_not_let_go() -> None:
    read, write = os.pipe()
    back, forth = os.pipe()
    words: list[bool] = []
    pipes = HandedPipes(*take_over([read, forth]), let_go=words.append)
    pipes.leave()
    await pipes.abort()
    assert (pipes.left, words) == (True, [])
    for fd in (write, back):
        os.close(fd)


async def test_there_is_no_second_one() -> None:
    with pytest.raises(HypervisorFailed):
        await HandedIngress().accept()
