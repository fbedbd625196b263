"""The policy that counts: read from its file, checked, and replaced by a reload only if the new one is right."""

import hashlib
import pwd
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import structlog

from crypto.files import read_bounded
from korora import tables
from korora.agents.integrity import certification
from korora.agents.integrity.certification import Certification
from korora.policy.rules import POLICY_BYTES_MAX, Compiler, PolicyTable, Rule, UidOf
from proxy.errors import ConfigurationError

log = structlog.get_logger("korora.policy")

DIGEST_BYTES: Final = 32
_WRITABLE_BY_OTHERS: Final = 0o022
_EXAMPLE: Final = "docs/policy.md"
_ABOUT: Final = re.compile(r": (?P<table>rule|triple)\[(?P<number>[0-9]{1,4})\]", re.ASCII)


def uid_of(login: str) -> int | None:
    """A user of this host."""
    try:
        return pwd.getpwnam(login).pw_uid
    except (KeyError, ValueError):  # a NUL in the name
        return None


def login_of(uid: int) -> str:
    """A uid for people: with its login name, where this host knows it."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules in the order of their file.

    Attributes:
        rules: each with a name of its own.
        digest: BLAKE2b-256 of the file, in hexadecimal; empty where there is none.
        unicode_names: whether machines' names may have more than ASCII in them.
        certification: who may perform which procedure on what; what is built in where the file says nothing of it.
    """

    rules: tuple[Rule, ...] = ()
    digest: str = ""
    unicode_names: bool = False
    certification: Certification = Certification.default()  # noqa: RUF009 - frozen, and the same for all

    @property
    def counts(self) -> bool:
        """Whether any rule goes by how many sessions there are."""
        return any(rule.counts for rule in self.rules)

    @property
    def configured(self) -> bool:
        """Whether there is a file: without one, whatever an authenticated peer asks is allowed."""
        return bool(self.digest)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file.

        Raises:
            ConfigurationError: it cannot be read, is too long, others may write it, or something in it is wrong.
        """
        try:
            content, mode = read_bounded(path, POLICY_BYTES_MAX)
        except OSError as error:
            raise ConfigurationError(f"{path}: cannot be read: {error.strerror}", "give a file that exists") from None
        except ValueError as error:
            raise ConfigurationError(f"{path}: it is {error}", "give a file of TOML") from None
        if mode & _WRITABLE_BY_OTHERS:
            raise ConfigurationError(f"{path}: others than its owner may write it", "chmod go-w it")
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, where: str, uid_of: UidOf = uid_of) -> Self:
        """Check a policy.

        Args:
            content: TOML, UTF-8.
            where: what errors call it.
            uid_of: the users that login names in it mean.

        Raises:
            ConfigurationError: something in it is wrong; the message names `where`, the key, and the rule's line.
        """
        raw = tables.load(content, where, _EXAMPLE)
        try:
            table = tables.convert(raw, PolicyTable, where)
            for name, count in Counter(rule.name for rule in table.rule).items():
                if count > 1:
                    raise ConfigurationError(
                        f"{where}: rule: {count} rules have the name {name!r}", "each needs a name of its own"
                    )
            compiler = Compiler(where, uid_of, unicode_names=table.unicode_names)
            rules = tuple(compiler.rule(number, each) for number, each in enumerate(table.rule))
            certified = certification.parse(raw, where)
        except ConfigurationError as error:
            raise ConfigurationError(_with_line(str(error), content, where, raw), error.remedy) from None
        digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()
        return cls(rules, digest, table.unicode_names, certified)


NO_POLICY: Final = Policy()


class PolicyFile:
    """Holds the policy that counts for what is asked next.

    Args:
        path: of the file; None where none is configured, which allows what an authenticated peer asks.

    Raises:
        ConfigurationError: see ``Policy.read``.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.current = NO_POLICY if path is None else Policy.read(path)

    @property
    def digest(self) -> str:
        """Of the policy that counts."""
        return self.current.digest

    def reload(self) -> Policy:
        """Read the file again: a good one counts from now on, with a bad one the old one stays.

        Raises:
            ConfigurationError: it is bad, and why.
        """
        if self.path is None:
            return self.current
        try:
            fresh = Policy.read(self.path)
        except ConfigurationError as error:
            log.warning("the policy's file is refused: the old policy stays", reason=str(error), policy=self.digest)
            raise
        if fresh.digest != self.current.digest:
            log.info("a new policy counts", policy=fresh.digest, before=self.digest, rules=len(fresh.rules))
        self.current = fresh
        return fresh


def lines_of(content: bytes, table: str) -> list[int]:
    """The line, from 1, of each ``[[table]]``; of those within a text of several lines, too."""
    lines = content.decode(errors="replace").splitlines()
    bare = (line.partition("#")[0].replace(" ", "").strip() for line in lines)
    return [number for number, line in enumerate(bare, 1) if line == f"[[{table}]]"]


def _with_line(message: str, content: bytes, where: str, raw: dict[str, object]) -> str:
    """Puts its line before the rule, or the triple, that an error is about, where that is certain."""
    match = _ABOUT.match(message.removeprefix(where))
    if match is None:
        return message
    lines, entries = lines_of(content, match["table"]), raw.get(match["table"])
    number = int(match["number"])
    if not isinstance(entries, list) or len(entries) != len(lines) or number >= len(lines):
        return message
    return f"{where}:{lines[number]}{message.removeprefix(where)}"
