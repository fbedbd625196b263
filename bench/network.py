"""Where the loopback traffic runs: in the machine's own network, or in a private one with plain congestion control.

TCP's congestion control matters even on loopback. BBR paces every segment by a timer, which costs all relays alike more
than their cryptography: figures taken under it say more about BBR than about relays. `private` therefore makes a
network namespace (for this process and its children, gone with them) whose connections use a loss-based control.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Final

from bench.processes import BenchError

CLONE_NEWNET: Final = 0x40000000  # unshare(2)
SIOCGIFFLAGS: Final = 0x8913  # netdevice(7)
SIOCSIFFLAGS: Final = 0x8914
IFF_UP: Final = 1
IFREQ: Final = struct.Struct("16sh22x")  # struct ifreq: name, flags, padding
CONGESTION_CONTROL: Final = Path("/proc/sys/net/ipv4/tcp_congestion_control")
LOSS_BASED: Final = ("cubic", "reno")  # in order of preference; a namespace may only have those the machine allows


def congestion_control() -> str:
    """The name of TCP's congestion control here."""
    try:
        return CONGESTION_CONTROL.read_text().strip()
    except OSError:
        return "unknown"


def enter_private_network() -> None:
    """Move this process, and so its children, into a network namespace with only loopback and no BBR.

    Raises:
        BenchError: not root, or the kernel has no network namespaces.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise BenchError(f"--network private: {reason}; run as root, or use --network host")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, SIOCGIFFLAGS, IFREQ.pack(b"lo", 0))
        _name, flags = IFREQ.unpack(answer)
        fcntl.ioctl(sock, SIOCSIFFLAGS, IFREQ.pack(b"lo", flags | IFF_UP))
    for name in LOSS_BASED:
        try:
            CONGESTION_CONTROL.write_text(name)
        except OSError:
            continue
        return
    raise BenchError(f"--network private: none of {', '.join(LOSS_BASED)} may be used; use --network host")
