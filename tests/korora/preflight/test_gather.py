"""What this host says of itself, from the kernel's files and xl's words as real hosts have them."""

import os
import stat
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from korora import __version__
from korora.preflight import gather
from korora.preflight.gather import FEATURES, Gatherer, XlInfo, ask_xl, read_xl_info
from proxy.limits import FEATURES_MAX
from proxy.preflight import HostFacts

MIB = 1024 * 1024

# /proc/cpuinfo of Linux 6.1 on a Xeon, its first processor and the head of the second.
CPUINFO = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 106
model name\t: Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz
stepping\t: 6
microcode\t: 0xd0003a5
cpu MHz\t\t: 1995.312
cache size\t: 43008 KB
fpu\t\t: yes
flags\t\t: fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht \
syscall nx pdpe1gb rdtscp lm constant_tsc rep_good nopl cpuid pni pclmulqdq vmx ssse3 fma cx16 sse4_1 sse4_2 movbe \
popcnt aes xsave avx f16c rdrand hypervisor lahf_lm abm 3dnowprefetch ibrs ibpb stibp tpr_shadow flexpriority ept vpid \
fsgsbase bmi1 avx2 bmi2 erms invpcid avx512f avx512dq rdseed adx clflushopt clwb sha_ni xsaveopt xsavec xgetbv1 gfni \
vaes avx512_vnni md_clear arch_capabilities
bugs\t\t: spectre_v1 spectre_v2 mmio_stale_data
power management:

processor\t: 1
vendor_id\t: NeverRead
flags\t\t: never_read
"""
MEMINFO = "MemTotal:       16393224 kB\nMemFree:         1234567 kB\nMemAvailable:   10240000 kB\nBuffers:  1 kB\n"

# `xl info` of Xen 4.17.3 under Debian 12.
XL_INFO = """\
host                   : host-b
release                : 6.1.0-28-amd64
version                : #1 SMP PREEMPT_DYNAMIC Debian 6.1.119-1 (2024-11-22)
machine                : x86_64
nr_cpus                : 4
max_cpu_id             : 3
nr_nodes               : 1
cores_per_socket       : 4
threads_per_core       : 1
cpu_mhz                : 1995.312
hw_caps                : 1789cbf5:f7fa3223:2c100800:00000121:0000000f:f1bf07eb:40417f5e:00000100
virt_caps              : pv hvm hap shadow gnttab-v1 gnttab-v2
total_memory           : 16310
free_memory            : 11835
sharing_freed_memory   : 0
sharing_used_memory    : 0
outstanding_claims     : 0
free_cpus              : 0
xen_major              : 4
xen_minor              : 17
xen_extra              : .3
xen_version            : 4.17.3
xen_caps               : xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64 \n\
xen_scheduler          : credit2
xen_pagesize           : 4096
platform_params        : virt_start=0xffff800000000000
xen_changeset          : \n\
xen_commandline        : placeholder dom0_mem=4096M,max:4096M ucode=scan
cc_compiler            : x86_64-linux-gnu-gcc (Debian 12.2.0-14) 12.2.0
cc_compile_by          : pkg-xen-devel
cc_compile_domain      : lists.alioth.debian.org
cc_compile_date        : Sat Feb 17 15:36:56 UTC 2024
build_id               : 1b2d34c2b3a9a5f9a3dd9f3a4fb1e7d0cc0b3d8c
xend_config_format     : 4
"""


def root(folder: Path, **files: str) -> Path:
    """A file system with these; `__` in a name stands for a slash."""
    for name, content in {"proc__cpuinfo": CPUINFO, "proc__meminfo": MEMINFO, **files}.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "sys/module").mkdir(parents=True, exist_ok=True)
    return folder


XEN: dict[str, str] = {
    "sys__hypervisor__type": "xen\n",
    "sys__hypervisor__version__major": "4\n",
    "sys__hypervisor__version__minor": "17\n",
    "sys__hypervisor__version__extra": ".3\n",
    "sys__hypervisor__properties__features": "00002f05\n",
    "sys__hypervisor__properties__capabilities": "xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64 \n",
}


def never() -> XlInfo:
    raise AssertionError("xl was asked")


def gatherer(folder: Path, **rest: Any) -> Gatherer:
    return Gatherer(folder, **{"root": folder, "xl": never, "clock": lambda: 1790000000.25, **rest})


def test_a_kvm_host(tmp_path: Path) -> None:
    root(tmp_path, sys__class__tpm__tpm0__tpm_version_major="2\n")
    (tmp_path / "sys/module/kvm_intel").mkdir()
    facts = gatherer(tmp_path).facts(thorough=True)
    assert facts.relay == __version__
    assert (facts.hypervisor, facts.hypervisor_version) == ("kvm", os.uname().release)
    assert facts.machine == os.uname().machine
    assert (facts.vendor, facts.cpu) == ("GenuineIntel", "Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz")
    assert {"aes", "avx512_vnni", "sha_ni", "3dnowprefetch", "lm", "xgetbv1"} <= set(facts.features)
    assert not {"ibrs", "md_clear", "vmx", "rep_good", "never_read", "hypervisor"} & set(facts.features)
    assert facts.virtualisation == ("ept", "vmx")
    assert (facts.memory_free_bytes, facts.memory_elastic) == (10000 * MIB, False)
    assert facts.room_bytes > 0
    assert facts.tpm == "2.0"
    assert facts.clock_ms == 1790000000250


def test_a_dom0_and_what_only_xl_knows(tmp_path: Path) -> None:
    asked: list[int] = []

    def xl() -> XlInfo:
        asked.append(1)
        return read_xl_info(XL_INFO)

    root(tmp_path, **XEN, sys__class__tpm__tpm0__tpm_version_major="1\n")
    known = gatherer(tmp_path, xl=xl)
    facts = known.facts(thorough=False)
    assert (facts.hypervisor, facts.hypervisor_version) == ("xen", "4.17.3")
    assert facts.virtualisation == ("hvm", "pv")
    assert (facts.memory_free_bytes, facts.tpm, asked) == (-1, "1.2", [])
    facts = known.facts(thorough=True)
    assert (facts.memory_free_bytes, facts.memory_elastic) == (11835 * MIB, False)
    known.facts(thorough=True)
    assert asked == [1]  # within a second one answer does


def test_many_that_ask_at_once_run_xl_once(tmp_path: Path) -> None:
    """A peer that floods with surveys starts no flood of processes."""
    asked: list[int] = []

    def xl() -> XlInfo:
        asked.append(1)
        time.sleep(0.05)
        return XlInfo(MIB)

    known = gatherer(root(tmp_path, **XEN), xl=xl)
    threads = [threading.Thread(target=known.facts, kwargs={"thorough": True}) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert asked == [1]


def test_an_xl_that_hangs_is_not_asked_by_each_that_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second counts from its answer: each thread that waits meanwhile would be one that hangs, too."""
    asked: list[int] = []
    moment = 100.0

    def xl() -> XlInfo:
        nonlocal moment
        asked.append(1)
        moment += gather.XL_INFO_SECONDS_MAX
        return XlInfo()

    monkeypatch.setattr(gather.time, "monotonic", lambda: moment)
    known = gatherer(root(tmp_path, **XEN), xl=xl)
    known.facts(thorough=True)
    known.facts(thorough=True)
    assert asked == [1]


def test_a_guest_of_xen_is_no_host_of_it(tmp_path: Path) -> None:
    facts = gatherer(root(tmp_path, **{**XEN, "sys__hypervisor__properties__features": "00002705\n"})).facts(
        thorough=False
    )
    assert facts.hypervisor == "none"
    without = {name: text for name, text in XEN.items() if not name.endswith("features")}
    folder = root(tmp_path / "dom0", **without, proc__xen__capabilities="control_d\n")
    assert gatherer(folder).facts(thorough=False).hypervisor == "xen"
    folder = root(tmp_path / "domU", **without, proc__xen__capabilities="")
    assert gatherer(folder).facts(thorough=False).hypervisor == "none"


def test_a_module_that_is_loaded_late(tmp_path: Path) -> None:
    known = gatherer(root(tmp_path))
    assert known.facts(thorough=False).hypervisor == "none"
    (tmp_path / "sys/module/kvm_amd").mkdir()
    assert known.facts(thorough=False).hypervisor == "kvm"


def test_what_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    facts = gatherer(tmp_path / "nothing").facts(thorough=True)
    assert msgspec.structs.replace(facts, room_bytes=-1) == HostFacts(
        relay=__version__, machine=os.uname().machine, clock_ms=1790000000250
    )
    assert facts.room_bytes > 0  # of the closest folder that there is


def test_a_file_system_that_counts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ramfs says 0 of everything; that is no full disk."""
    known = partial(SimpleNamespace, f_frsize=4096)
    monkeypatch.setattr(gather.os, "statvfs", lambda _: known(f_bavail=0, f_blocks=0))
    assert gatherer(root(tmp_path)).facts(thorough=False).room_bytes == -1
    monkeypatch.setattr(gather.os, "statvfs", lambda _: known(f_bavail=0, f_blocks=100))
    assert gatherer(root(tmp_path)).facts(thorough=False).room_bytes == 0


@pytest.mark.parametrize(
    ("text", "free", "elastic"),
    [
        (XL_INFO, 11835 * MIB, False),
        (XL_INFO.replace("dom0_mem=4096M,max:4096M ", ""), 11835 * MIB, True),
        (XL_INFO.replace("11835", "many"), -1, False),
        (XL_INFO.replace("11835", "9" * 40), -1, False),
        ("", -1, False),
        ("xl: cannot open libxl\n", -1, False),
    ],
)
def test_xl_info(text: str, free: int, elastic: bool) -> None:
    assert read_xl_info(text) == XlInfo(free, elastic)


@pytest.mark.parametrize("script", ["exit 1", "exec sleep 60", None], ids=["fails", "hangs", "is not there"])
def test_an_xl_that_does_not_answer(script: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gather, "XL_INFO_SECONDS_MAX", 0.3)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if script is not None:
        (tmp_path / "xl").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "xl").chmod(stat.S_IRWXU)
    assert ask_xl() == XlInfo()


def test_this_very_host() -> None:
    facts = Gatherer(Path.home()).facts(thorough=False)
    assert msgspec.convert(msgspec.to_builtins(facts), HostFacts) == facts  # it fits the wire
    assert facts.machine
    assert facts.clock_ms > 0


def test_the_names_of_features_fit_the_wire() -> None:
    assert len(FEATURES) <= FEATURES_MAX
    msgspec.convert({"features": sorted(FEATURES)}, HostFacts)


def test_a_relay_that_looks_at_nothing_loads_nothing_of_it() -> None:
    program = (
        "import sys, korora.relay, korora.daemon.worker; "
        "print([name for name in sys.modules if name.startswith('korora.preflight')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
