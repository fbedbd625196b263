"""What this host is: read from the kernel, and of Xen's xl where it takes no less. Nothing here raises.

What does not change while a process lives is read once. Everything else costs some tens of microseconds a time, but
`xl info`, which is a process: it is run for a survey alone, and one answer serves all that ask within a second.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from korora import __version__
from proxy.limits import FACTS_TEXT_CHARACTERS_MAX, FEATURES_MAX, KIB, XL_OUTPUT_BYTES_MAX
from proxy.preflight import HostFacts

XL_INFO_SECONDS_MAX: Final = 5.0  # it takes some 20 ms, and who asked waits for 10 s
XL_INFO_SECONDS: Final = 1.0  # how old an answer of it may be
FILE_BYTES_MAX: Final = 64 * KIB  # of the kernel's; the longest, /proc/meminfo, has 2
CPU_BYTES_MAX: Final = 8 * KIB  # the first processor takes 2; there may be hundreds, and the kernel asks each of them
DEVICES: Final = 8  # TPMs that are looked at: hosts have one

# What a program in a machine may have found at its start and uses from then on. Names of Linux,
# arch/x86/include/asm/cpufeatures.h; those that the kernel makes up (of bugs, mitigations and the like) are not here.
_FEATURES: Final = """
    lm nx pdpe1gb rdtscp syscall cx8 cx16 lahf_lm cmov fxsr mmx sse sse2 pni ssse3 sse4_1 sse4_2 sse4a misalignsse
    popcnt abm movbe aes pclmulqdq xsave xsaveopt xsavec xgetbv1 xsaves avx f16c fma fma4 xop tbm avx2 bmi1 bmi2
    adx sha_ni rdrand rdseed fsgsbase erms fsrm clflush clflushopt clwb 3dnowprefetch invpcid pcid hle rtm mpx pku
    avx512f avx512dq avx512cd avx512bw avx512vl avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg
    avx512_vpopcntdq avx512_bf16 avx512_fp16 avx512_vp2intersect avx_vnni avx_ifma gfni vaes vpclmulqdq rdpid
    movdiri movdir64b serialize waitpkg cldemote amx_tile amx_int8 amx_bf16 amx_fp16 la57 clzero wbnoinvd
"""
FEATURES: Final = frozenset(_FEATURES.split())
VIRTUALISATION: Final = frozenset({"vmx", "svm", "ept", "npt"})

_DOM0: Final = 11  # XENFEAT_dom0, xen/include/public/features.h
_CAPABILITIES: Final = (("pv", "xen-3.0-"), ("hvm", "hvm-3.0-"))  # xen/arch/x86/setup.c, arch_get_xen_caps
_XL_INFO: Final = re.compile(r"^(?P<key>[a-z_0-9]+) +: (?P<value>.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class XlInfo:
    """What `xl info` says beyond what the kernel shows.

    Attributes:
        free_bytes: that no domain has; -1 where it does not tell.
        elastic: whether dom0 has all memory and gives it away: ``dom0_mem`` is not on Xen's command line.
    """

    free_bytes: int = -1
    elastic: bool = False


def read_xl_info(text: str) -> XlInfo:
    """`xl info` of Xen 4.17 (tools/xl/xl_info.c): a line a key; ``free_memory`` is in MiB."""
    found = {match["key"]: match["value"].strip() for match in _XL_INFO.finditer(text)}
    free = found.get("free_memory", "")
    if "xen_commandline" not in found:
        return XlInfo(_mebibytes(free))
    given = any(word.startswith("dom0_mem=") for word in found["xen_commandline"].split())
    return XlInfo(_mebibytes(free), elastic=not given)


def ask_xl() -> XlInfo:
    """Run `xl info`; what it does not say in time is unknown."""
    import subprocess

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["xl", "info"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=XL_INFO_SECONDS_MAX,
            check=True,
        )
        return read_xl_info(done.stdout[:XL_OUTPUT_BYTES_MAX].decode(errors="replace"))
    return XlInfo()


class Gatherer:
    """Reads this host. May be called from several threads.

    Args:
        state: the folder where the relay keeps its state.
        root: of the file systems that are read.
        xl: asks it.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        state: Path,
        *,
        root: Path = Path("/"),
        xl: Callable[[], XlInfo] = ask_xl,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state, self._root, self._xl, self._clock = state, root, xl, clock
        self._lock = threading.Lock()
        self._static: HostFacts | None = None
        self._asked: tuple[float, XlInfo] | None = None

    def facts(self, *, thorough: bool) -> HostFacts:
        """See ``proxy.preflight.Surveyor.facts``."""
        static = self._static = self._static or self._read_static()
        if static.hypervisor != "xen":
            static = self._with_kvm(static)
        memory = self._memory(static, thorough=thorough)
        return msgspec.structs.replace(
            static,
            memory_free_bytes=memory.free_bytes,
            memory_elastic=memory.elastic,
            room_bytes=_room(self._state),
            clock_ms=self.now_ms(),
        )

    def now_ms(self) -> int:
        """The host's time."""
        return max(0, int(self._clock() * 1000))

    # ---- what does not change

    def _read_static(self) -> HostFacts:
        cpu = _first_processor(self._read("proc/cpuinfo", CPU_BYTES_MAX))
        words = frozenset(cpu.get("flags", "").split())
        facts = HostFacts(
            relay=__version__,
            machine=_text(os.uname().machine),
            vendor=_text(cpu.get("vendor_id", "")),
            cpu=_text(cpu.get("model name", "")),
            features=tuple(sorted(words & FEATURES))[:FEATURES_MAX],
            virtualisation=tuple(sorted(words & VIRTUALISATION)),
            tpm=self._tpm(),
        )
        # A guest of Xen has /sys/hypervisor, too, and Xen runs no machines of its.
        if self._read("sys/hypervisor/type").strip() != "xen" or not self._in_dom0():
            return facts
        version = ".".join(self._read(f"sys/hypervisor/version/{part}").strip() for part in ("major", "minor"))
        capable = self._read("sys/hypervisor/properties/capabilities").split()
        return msgspec.structs.replace(
            facts,
            hypervisor="xen",
            hypervisor_version=_text((version + self._read("sys/hypervisor/version/extra").strip()).strip(".")),
            virtualisation=tuple(
                name for name, begin in sorted(_CAPABILITIES) if any(word.startswith(begin) for word in capable)
            ),
        )

    def _with_kvm(self, facts: HostFacts) -> HostFacts:
        """Looked at each time, for a module may be loaded late; not by /dev/kvm, which a service may not see."""
        modules = self._root / "sys/module"
        if any((modules / name).is_dir() for name in ("kvm_intel", "kvm_amd")):
            return msgspec.structs.replace(facts, hypervisor="kvm", hypervisor_version=_text(os.uname().release))
        return msgspec.structs.replace(facts, hypervisor="none") if modules.is_dir() else facts

    def _in_dom0(self) -> bool:
        try:
            return bool(int(self._read("sys/hypervisor/properties/features").split()[0], 16) >> _DOM0 & 1)
        except (ValueError, IndexError):
            return "control_d" in self._read("proc/xen/capabilities")

    def _tpm(self) -> Literal["", "1.2", "2.0"]:
        for number in range(DEVICES):
            major = self._read(f"sys/class/tpm/tpm{number}/tpm_version_major").strip()
            if major in {"1", "2"}:
                return "2.0" if major == "2" else "1.2"
        return ""

    # ---- what does

    def _memory(self, static: HostFacts, *, thorough: bool) -> XlInfo:
        if static.hypervisor != "xen":
            match = re.search(r"^MemAvailable: +([0-9]{1,15}) kB$", self._read("proc/meminfo"), re.MULTILINE)
            return XlInfo(-1 if match is None else int(match[1]) * KIB)
        if not thorough:
            return XlInfo()
        with self._lock:  # whoever comes meanwhile has the same answer
            if self._asked is None or time.monotonic() - self._asked[0] > XL_INFO_SECONDS:
                answer = self._xl()
                self._asked = (time.monotonic(), answer)  # of now: else an xl that hangs is asked by each that waits
            return self._asked[1]

    def _read(self, name: str, bytes_max: int = FILE_BYTES_MAX) -> str:
        """A file of the kernel's; empty where there is none."""
        try:
            with (self._root / name).open("rb", buffering=0) as file:
                return file.read(bytes_max).decode(errors="replace")
        except OSError:
            return ""


def _first_processor(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _text(words: str) -> str:
    clean = "".join(character for character in words if character.isprintable())
    return clean[:FACTS_TEXT_CHARACTERS_MAX]


def _mebibytes(text: str) -> int:
    return int(text) * KIB * KIB if text.isascii() and text.isdigit() and len(text) < 13 else -1


def _room(folder: Path) -> int:
    """Free bytes there; -1 where its file system does not count them, as ramfs."""
    for known in (folder, *folder.absolute().parents):
        try:
            found = os.statvfs(known)
        except FileNotFoundError:
            continue
        except OSError:
            return -1
        return found.f_bavail * found.f_frsize if found.f_blocks else -1
    return -1
