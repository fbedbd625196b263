"""Puts the parts of a Xen host together: a small initramfs, a read-only disk, and guests. Used by fetch-xen.

An image is a folder with
    xen             the hypervisor, as an ELF file that QEMU starts by multiboot
    kernel, initrd  dom0's kernel, and an initramfs that loads a few modules and mounts the disk
    disk            an ext4 file system: toolstack, Python 3.11, the relay's dependencies, an agent; never written
    python          runs the same Python here, through its own loader, so that what it will import can be compiled
    root/           the tree the disk was made of
The disk also has /guest/kernel and /guest/initrd, which guests are made of; /guest/beat, which is a small guest by
itself; and /etc/rig/points.so, which stops a program at a point of a migration if it is preloaded.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from private_apt import RigError, run

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))
from korora.demo.guest import CpioEntry, newc  # noqa: E402 - standard library alone, like everything here

PARTS = Path(__file__).resolve().parent / "xen"
DISK_SLACK = 1.15  # of what the files hold: block sizes and inodes
MODULES = (  # with what they depend on; in this order
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "crc32c_generic",
    "ext4",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xenfs",
    "loop",  # these two for guests with disks, which the tests have none of so far
    "xen-blkback",
)
SURPLUS = (
    "boot",
    "usr/lib/modules",
    "usr/lib/debug",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/xen-4.17/boot",
    "usr/lib/python3.11/test",
    "usr/lib/python3.11/ensurepip",
    "usr/lib/python3.11/idlelib",
    "usr/lib/python3.11/lib2to3",
)
ACCOUNTS = "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
ETC = {
    "passwd": ACCOUNTS,
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost xen\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "xen/xl.conf": 'autoballoon="off"\n',  # dom0 has the memory that Xen's command line gives it
}
WRAPPER = """\
#!/bin/sh
# A program of Debian bookworm, run here through its own loader and libraries. Written by deploy/rig/xen_image.py.
root=$(CDPATH= cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd)/root
lib=$root/usr/lib/x86_64-linux-gnu
loader=$root/lib64/ld-linux-x86-64.so.2
{command}
"""
BARE = [  # nothing beneath it: no C library, no stack protector, no vector registers
    *("-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pic", "-fno-stack-protector", "-mno-red-zone"),
    *("-fno-asynchronous-unwind-tables", "-mgeneral-regs-only", "-Wl,-Ttext-segment=0x100000", "-Wl,--build-id=none"),
]
PYTHON = 'PYTHONHOME="$root/usr" exec "$loader" --library-path "$lib" "$root/usr/bin/python3.11" "$@"'
QEMU = """export QEMU_MODULE_DIR="$lib/qemu"
exec "$loader" --library-path "$lib:$root/lib/x86_64-linux-gnu" "$root/usr/bin/qemu-system-x86_64" \\
    -L "$root/usr/share/seabios" -L "$root/usr/share/qemu" "$@\""""
KORORA = """\
#!/bin/sh
# The relay of the checkout that the tests have put into /opt/korora.
export PYTHONPATH=/opt/korora PYTHONDONTWRITEBYTECODE=1
exec /usr/bin/python3.11 -m korora "$@"
"""


def sources() -> list[Path]:
    """The files an image follows from, besides packages and wheels."""
    here = Path(__file__).resolve()
    return [here, here.with_name("fetch-xen"), *sorted(path for path in PARTS.iterdir() if path.is_file())]


def build(into: Path, packages: Path, python: Path, guest_kernel: Path) -> None:
    """Make an image in the empty folder `into`.

    Args:
        packages: the unpacked Debian packages.
        python: the relay's dependencies, as `pip install --target` leaves them.
        guest_kernel: the kernel of the guests; fetch-kernel gets it.

    Raises RigError.
    """
    for tool, package in (("mke2fs", "e2fsprogs"), ("cc", "gcc"), ("cp", "coreutils")):
        if shutil.which(tool) is None:
            raise RigError(f"{tool} is missing: install {package}")
    if not guest_kernel.is_file():
        raise RigError(f"there is no kernel for guests at {guest_kernel}: run deploy/rig/fetch-kernel")
    kernels = sorted((packages / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise RigError(f"{packages} holds {len(kernels)} kernels: remove the folder above it and try again")
    version = kernels[0].name.removeprefix("vmlinuz-")
    shutil.copyfile(kernels[0], into / "kernel")
    (into / "xen").write_bytes(gzip.decompress((packages / "boot" / "xen-4.17-amd64.gz").read_bytes()))
    (into / "initrd").write_bytes(dom0_initramfs(packages, version))
    root = into / "root"
    fill_root(root, packages, python)
    (root / "guest").mkdir()
    shutil.copyfile(guest_kernel, root / "guest" / "kernel")
    (root / "guest" / "initrd").write_bytes(guest_initramfs(into))
    compile_part("beat.c", root / "guest" / "beat", BARE)
    compile_part("points.c", root / "etc" / "rig" / "points.so", ["-fPIC", "-shared"])
    compile_all(write_wrapper(into, "python", PYTHON), root)
    make_disk(into / "disk", root)


def write_wrapper(folder: Path, name: str, command: str) -> Path:
    """A script in `folder` that runs a program of the tree `root` beside it."""
    path = folder / name
    path.write_text(WRAPPER.format(command=command))
    path.chmod(0o755)
    return path


def dom0_initramfs(packages: Path, version: str) -> bytes:
    """Busybox, the modules in the order of their loading, and /init."""
    order = with_dependencies(packages / "lib" / "modules" / version / "kernel", MODULES)
    entries = [CpioEntry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "modules")]
    entries.append(CpioEntry("bin/busybox", stat.S_IFREG | 0o755, (packages / "bin" / "busybox").read_bytes()))
    entries.append(CpioEntry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"))
    entries += [CpioEntry(f"modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes()) for path in order]
    names = "".join(f"{path.name}\n" for path in order)
    entries.append(CpioEntry("modules/order", stat.S_IFREG | 0o644, names.encode()))
    entries.append(CpioEntry("init", stat.S_IFREG | 0o755, (PARTS / "start").read_bytes()))
    return gzip.compress(newc(entries), compresslevel=1, mtime=0)


def with_dependencies(folder: Path, wanted: tuple[str, ...]) -> list[Path]:
    """The files of kernel modules, each after those it depends on (by its own .modinfo: depmod has never run here)."""
    found = {path.stem.replace("-", "_"): path for path in folder.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = found.get(name.replace("-", "_"))
        if path is None:
            raise RigError(f"the kernel's package has no module {name}")
        if path in order:
            return
        depends = re.search(rb"\0depends=([\w,-]*)\0", path.read_bytes())
        for other in filter(None, depends.group(1).decode().split(",") if depends else ()):
            add(other)
        order.append(path)

    for name in wanted:
        add(name)
    return order


def fill_root(root: Path, packages: Path, python: Path) -> None:
    """The tree of dom0's disk."""
    run(["cp", "-a", "--reflink=auto", str(packages), str(root)])
    for name in ("bin", "sbin", "lib", "lib64"):
        if (root / name).is_dir() and not (root / name).is_symlink():
            shutil.copytree(root / name, root / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(root / name)
        (root / name).symlink_to(f"usr/{name}")
    for name in SURPLUS:
        shutil.rmtree(root / name, ignore_errors=True)
    shutil.rmtree(root / "var", ignore_errors=True)
    for name in ("dev", "proc", "sys", "run", "tmp", "var", "root", "opt"):
        (root / name).mkdir(exist_ok=True)
    modules = root / "usr" / "local" / "lib" / "python3.11" / "dist-packages"
    modules.parent.mkdir(parents=True)
    run(["cp", "-a", "--reflink=auto", str(python), str(modules)])
    for name in (*modules.glob("*/tests"), *modules.glob("numpy/*/tests")):
        shutil.rmtree(name)
    etc = root / "etc"
    for name, text in ETC.items():
        (etc / name).parent.mkdir(parents=True, exist_ok=True)
        (etc / name).write_text(text)
    (etc / "rig").mkdir()
    for name, target in (("toolstack", "rig/toolstack"), ("agent.py", "rig/agent.py"), ("inittab", "inittab")):
        shutil.copy(PARTS / name, etc / target)
    (etc / "rig" / "toolstack").chmod(0o755)
    (root / "usr" / "bin" / "korora").write_text(KORORA)
    (root / "usr" / "bin" / "korora").chmod(0o755)
    xen = root / "usr" / "lib" / "xen-4.17" / "bin"
    for name in ("xl", "oxenstored", "xenconsoled", "xen-init-dom0"):
        link = root / "usr" / "sbin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(f"/{(xen / name).relative_to(root)}")
    add_applets(root)


def add_applets(root: Path) -> None:
    """A link for each of busybox's programs that the packages have not brought."""
    folder = root / "usr" / "bin"
    for name in run([str(folder / "busybox"), "--list"]).split():
        if not any((root / "usr" / place / name).exists() for place in ("bin", "sbin")):
            link = folder / name
            link.unlink(missing_ok=True)
            link.symlink_to("busybox")


def compile_part(source: str, program: Path, options: list[str]) -> None:
    """Make a program of one of our C files."""
    compiler = ["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-s"]
    run([*compiler, *options, "-o", str(program), str(PARTS / source)])


def guest_initramfs(folder: Path) -> bytes:
    """The guest's whole file system: its one program."""
    program = folder / "workload"
    compile_part("workload.c", program, ["-static"])
    entries = [CpioEntry("dev", stat.S_IFDIR | 0o755), CpioEntry("init", stat.S_IFREG | 0o755, program.read_bytes())]
    program.unlink()
    return gzip.compress(newc(entries), compresslevel=9, mtime=0)


def compile_all(python: Path, root: Path) -> None:
    """Byte code for every module, as nothing can be written at run time; tried: the image's Python runs here."""
    modules = [root / "usr" / "lib" / "python3.11", root / "usr" / "local" / "lib" / "python3.11"]
    # A file that this Python cannot compile (templates, other versions' syntax) is nobody's to import.
    command = [str(python), "-I", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", str(root), "-p", "/", *map(str, modules)]
    try:
        subprocess.run(command, capture_output=True, timeout=300, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise RigError(f"the image's Python does not run here: {error}") from None
    if not list(modules[0].glob("__pycache__/json*")) and not list(modules[0].glob("json/__pycache__/*")):
        raise RigError("the image's Python compiled nothing")


def make_disk(disk: Path, root: Path) -> None:
    """An ext4 file system of the tree, everything owned by root."""
    sizes = (os.lstat(Path(folder) / name).st_size for folder, _, names in os.walk(root) for name in names)
    kilobytes = int(sum((size + 4095) // 4096 * 4 for size in sizes) * DISK_SLACK) + 16 * 1024
    command = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-b", "4096"]
    run([*command, "-E", "root_owner=0:0", "-d", str(root), str(disk), f"{kilobytes}k"])
