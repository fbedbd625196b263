"""The demo's guest: an initramfs of busybox and one shell script, made here byte by byte.

The script fills memory, keeps changing it, checks what it wrote, and counts aloud on the serial line. A migration that
loses, repeats or stales a single page shows up as a wrong number or as `bad` above zero.
"""

from __future__ import annotations

import gzip
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NEWC_MAGIC = b"070701"  # cpio(5), "New ASCII Format"
BEAT_SECONDS = 0.1  # the guest's pause between two heartbeats; the beat itself adds a few milliseconds under emulation

APPLETS = ("sh", "mount", "mkdir", "dd", "md5sum", "sleep", "cat", "poweroff")

# The kernel hands `name=value` words of its command line that it does not know to init as environment variables.
INIT = """\
#!/bin/sh
# s*: STATIC_MIB of random bytes, checked in turns. b*: BLOCKS x 256 KiB, rewritten whole with fresh random bytes.
# w*: WORDS pages of which only the first bytes change (what delta encodings live on).
# Whatever is read back wrong counts as bad.
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mkdir -p /mem
mount -t tmpfs -o size=90% mem /mem
cd /mem

echo "GUEST filling memory"
i=0
while [ $i -lt $STATIC_MIB ]; do
    dd if=/dev/urandom of=s$i bs=64k count=16 2>/dev/null
    read sum_s$i rest <<END
$(md5sum s$i)
END
    i=$((i + 1))
done
i=0
while [ $i -lt $BLOCKS ]; do
    dd if=/dev/urandom of=b$i bs=64k count=4 2>/dev/null
    read sum_b$i rest <<END
$(md5sum b$i)
END
    i=$((i + 1))
done
i=0
dd if=/dev/urandom of=page bs=4096 count=1 2>/dev/null
while [ $i -lt $WORDS ]; do
    cat page >w$i
    echo "0 " 1<>w$i
    i=$((i + 1))
done
# state is never truncated: a reader must not find it empty between two writes (the numbers only grow)
echo "0 0 0" >state

check() { # FILE EXPECTED
    read sum rest <<END
$(md5sum $1)
END
    checked=$((checked + 1))
    [ "$sum" = "$2" ] || bad=$((bad + 1))
}

change_memory() {
    round=0 written=0 checked=0 bad=0
    while :; do
        b=$((round % BLOCKS))
        eval "check b$b \\$sum_b$b"
        dd if=/dev/urandom of=b$b bs=64k count=4 conv=notrunc 2>/dev/null
        read sum_b$b rest <<END
$(md5sum b$b)
END
        written=$((written + 64))
        w=0
        while [ $w -lt $WORDS ]; do
            read seen rest <w$w
            [ "$seen" = $round ] || bad=$((bad + 1))
            echo "$((round + 1)) " 1<>w$w
            w=$((w + 1))
        done
        written=$((written + WORDS))
        checked=$((checked + 1))
        s=$((round / 2 % STATIC_MIB))
        [ $((round % 2)) -ne 0 ] || eval "check s$s \\$sum_s$s"
        round=$((round + 1))
        echo "$written $checked $bad" 1<>state
        sleep $PAUSE
    done
}

change_memory &
beat=0
while :; do
    read up rest </proc/uptime
    read written checked bad <state
    echo "HB $beat t=$up written=$written checked=$checked bad=$bad"
    beat=$((beat + 1))
    sleep 0.1
done
"""


@dataclass(frozen=True, slots=True)
class GuestSpec:
    """How large the guest is and how busy.

    Args:
        memory_mib: RAM of the machine in MiB; the kernel and its initramfs take about 50.
        static_mib: random bytes written once, in MiB.
        blocks: 256 KiB blocks that are rewritten whole in turns.
        words: pages of which a few bytes change in every round.
        pause_seconds: rest between two rounds of changes.
    """

    memory_mib: int = 128
    static_mib: int = 16
    blocks: int = 16
    words: int = 64
    pause_seconds: float = 0.05

    @property
    def checks_of_everything(self) -> int:
        """After how many more of its checks the guest has looked at all of its memory once."""
        rounds = max(self.blocks, 2 * self.static_mib)
        return 3 * rounds  # in each round a block and the words, in every second one a static part

    def kernel_arguments(self) -> str:
        """The kernel's command line: a silent boot on the first serial port, and what init reads."""
        return (
            "console=ttyS0 quiet loglevel=0 panic=-1 nokaslr mitigations=off random.trust_cpu=on "
            f"STATIC_MIB={self.static_mib} BLOCKS={self.blocks} WORDS={self.words} PAUSE={self.pause_seconds}"
        )


@dataclass(frozen=True, slots=True)
class CpioEntry:
    """One member of an initramfs: a directory, a regular file, or a symbolic link (whose data is its target)."""

    name: str
    mode: int
    data: bytes = b""


def newc(entries: Iterable[CpioEntry]) -> bytes:
    """Pack `entries` as a cpio archive in the "newc" format the kernel unpacks at boot (cpio(5)).

    Every member belongs to root, has the time 0 and an inode of its own, so that equal input gives equal bytes.
    """
    archive = bytearray()
    for inode, entry in enumerate([*entries, CpioEntry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        archive += NEWC_MAGIC + b"".join(b"%08X" % value for value in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def initramfs(busybox: Path) -> bytes:
    """The guest's whole file system, gzipped: busybox, a link for each applet the script calls, and /init."""
    folders = ("bin", "dev", "proc", "mem")
    entries = [CpioEntry(name, stat.S_IFDIR | 0o755) for name in folders]
    entries.append(CpioEntry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries += [CpioEntry(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox") for applet in APPLETS]
    entries.append(CpioEntry("init", stat.S_IFREG | 0o755, INIT.encode()))
    return gzip.compress(newc(entries), compresslevel=1, mtime=0)
