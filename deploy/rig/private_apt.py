"""Packages of a Debian release, beside the machine's own: a private apt that changes nothing outside its folder.

Used by the `fetch-` scripts beside it; standard library only, so that it runs before any virtual environment exists.
The mirror is the one the machine's own apt uses. Every package is checked by apt against the archive's signature.
Works as root and as an ordinary user alike.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_TIMEOUT_SECONDS = 300  # a slow mirror sends 30 MB in this time; a dead one must not hold `make` for ever
RELEASES = {"bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable"}
PACKAGES_MAX = 200  # the dependency walk of one QEMU is about 50; more means that something is wrong


class RigError(Exception):
    """What stands in the way, in one sentence with its remedy."""


def rig_directory() -> Path:
    """The folder that holds the rig: `$KORORA_RIG`, or `.cache/rig` of this checkout."""
    named = os.environ.get("KORORA_RIG")
    return Path(named).absolute() if named else Path(__file__).resolve().parents[2] / ".cache" / "rig"


def say(text: str) -> None:
    """One line for the person who runs `make`."""
    sys.stdout.write(f"{Path(sys.argv[0]).name}: {text}\n")
    sys.stdout.flush()


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and turn a RigError into one line and exit code 1."""
    try:
        main()
    except RigError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the rig's lock, so that two `make` at once do not build the same thing in each other's way."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(command: list[str], env: dict[str, str] | None = None) -> str:
    """Run `command`, return its standard output, raise RigError with its last line when it fails."""
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=APT_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RigError(f"`{' '.join(command[:2])}` gave no answer in {APT_TIMEOUT_SECONDS} s") from None
    except OSError as error:
        raise RigError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("E:")]
        reason = said[0] if said else (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RigError(f"`{' '.join(command[:2])}` failed: {reason}")
    return done.stdout


class PrivateApt:
    """One Debian release's packages through an apt with its own lists, cache and (empty) status; a context manager.

    Entering raises RigError when this is no Debian, its keyring is missing or the mirror does not answer; leaving
    removes the lists and the cache (nearly 100 MB a release).

    Arguments:
        folder: where configuration, lists and downloads are kept meanwhile.
        suite: the release's codename, e.g. "trixie".
    """

    def __init__(self, folder: Path, suite: str) -> None:
        self.suite = suite
        self.folder = folder / suite
        self._env = {**os.environ, "APT_CONFIG": str(self.folder / "apt.conf"), "LC_ALL": "C"}

    def __enter__(self) -> Self:
        try:
            self._prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prepare(self) -> None:
        """Write the configuration and read the release's package index."""
        for tool in ("apt-get", "apt-cache", "apt-config", "dpkg"):
            if shutil.which(tool) is None:
                raise RigError(f"{tool} is missing: this needs a Debian or Debian-like system with apt")
        if not KEYRING.exists():
            raise RigError(f"{KEYRING} is missing: install the package debian-archive-keyring")
        for name in ("lists/partial", "cache/archives/partial", "none"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        source = f"deb [arch=amd64 signed-by={KEYRING}] {debian_mirror()} {self.suite} main\n"
        (self.folder / "sources.list").write_text(source)
        # The machine's proxies and certificates hold here as well; its hooks, which clean *its* caches, must not.
        inherited = [line for line in run(["apt-config", "dump"]).splitlines() if line.startswith("Acquire::")]
        settings = {
            "Dir::Etc::SourceList": self.folder / "sources.list",
            "Dir::Etc::SourceParts": self.folder / "none",
            "Dir::Etc::Main": self.folder / "none" / "apt.conf",
            "Dir::Etc::Parts": self.folder / "none",
            "Dir::Etc::Preferences": self.folder / "none" / "preferences",
            "Dir::Etc::PreferencesParts": self.folder / "none",
            "Dir::State": self.folder,
            "Dir::State::Lists": self.folder / "lists",
            "Dir::State::Status": "/dev/null",
            "Dir::Cache": self.folder / "cache",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",  # the unprivileged user could not write into a checkout under /root
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "30",
            "Acquire::https::Timeout": "30",
            "Acquire::AllowInsecureRepositories": "false",
            "APT::Get::AllowUnauthenticated": "false",
        }
        own = [f'{key} "{value}";' for key, value in settings.items()]
        configuration = self.folder / "apt.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("\n".join([*inherited, *own]) + "\n")
        run(["apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any"], self._env)

    def depends(self, packages: Iterable[str]) -> dict[str, list[str]]:
        """The first alternative of each (pre-)dependency of `packages`, by package."""
        wanted = sorted(packages)
        text = run(["apt-cache", "show", "--no-all-versions", *wanted], self._env)
        found: dict[str, list[str]] = {}
        for paragraph in text.split("\n\n"):
            fields = dict(re.findall(r"^([\w-]+): (.*)$", paragraph, re.MULTILINE))
            if "Package" in fields:
                relations = ",".join(fields[key] for key in ("Pre-Depends", "Depends") if key in fields)
                names = [re.match(r"\s*([a-z0-9.+-]+)", item) for item in relations.split(",")]
                found[fields["Package"]] = [match.group(1) for match in names if match]
        return found

    def libraries_of(self, package: str) -> set[str]:
        """The shared-library packages `package` needs to be loaded, and theirs: what its own loader has to find."""
        found: set[str] = set()
        wave = {package}
        while wave:
            needs = {name for names in self.depends(wave).values() for name in names}
            wave = {name for name in needs if name.startswith(("lib", "zlib"))} - found
            found |= wave
            if len(found) > PACKAGES_MAX:
                raise RigError(f"{package} needs more than {PACKAGES_MAX} libraries: is this Debian {self.suite}?")
        return found

    def unpack(self, packages: Iterable[str], into: Path) -> list[str]:
        """Download `packages` (signatures checked by apt) and unpack their files into `into`.

        Returns NAME_VERSION_ARCHITECTURE of each.
        """
        archives = self.folder / "cache" / "download"
        shutil.rmtree(archives, ignore_errors=True)
        archives.mkdir(parents=True)
        wanted = sorted(packages)
        # `apt-get download` writes into the current directory.
        run(["env", "-C", str(archives), "apt-get", "download", "-q", *wanted], self._env)
        got = sorted(archives.glob("*.deb"))
        if len(got) != len(wanted):
            raise RigError(f"the mirror gave {len(got)} of {len(wanted)} packages: try again")
        into.mkdir(parents=True, exist_ok=True)
        for archive in got:
            run(["dpkg", "-x", str(archive), str(into)])
        shutil.rmtree(archives)
        return [archive.stem for archive in got]


def debian_mirror() -> str:
    """The address of the Debian archive that the machine's own apt uses."""
    targets = run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    )
    rows = [line.split() for line in targets.splitlines() if len(line.split()) == 3]
    for uri, release, component in rows:
        if component == "main" and release in RELEASES:
            return uri
    raise RigError("apt's sources name no Debian archive (bookworm or newer, component main)")
