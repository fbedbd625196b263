"""What ``xl list -v`` says, read strictly. Sans-IO; the format is list_domains() of Xen 4.17's tools/xl/xl_info.c."""

import re
from dataclasses import dataclass
from typing import Final

from proxy.errors import HypervisorFailed
from proxy.limits import XL_DOMAINS_MAX

INCOMING: Final = "--incoming"  # behind the name of a copy that arrives, tools/xl/xl_vmcontrol.c
AWAY: Final = "--migratedaway"  # behind the name of a copy that was given up, tools/xl/xl_migrate.c

_HEAD: Final = ("Name", "ID", "Mem", "VCPUs", "State", "Time(s)", "UUID", "Reason-Code", "Security", "Label")

# A name may contain blanks and may itself look like the rest of a line: what follows it is anchored at the line's end.
_LINE: Final = re.compile(
    r"(?P<name>.*\S|) +(?P<id>[0-9]{1,5}) +[0-9]+ +[0-9]+     "
    r"(?P<running>[r-])(?P<blocked>[b-])(?P<paused>[p-])(?P<shutdown>[s-])(?P<reason>[-rscwS?])(?P<dying>[d-])"
    r" +[0-9]+\.[0-9] (?P<uuid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}) +(?:-|[0-9a-f]{1,8}) +\S+",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class XlDomain:
    """One line of the list.

    Args:
        domid: its id: Xen gives it to one domain at a time, and libxl to no other soon afterwards.
        paused: by a toolstack; it does not run.
        shutdown: it has ended or was suspended; it does not run.
        reason: why, as xl's letter: ``-`` powered off, ``r`` reboots, ``s`` suspended, ``c`` crashed, ``w`` its
            watchdog, ``S`` soft reset, ``?`` unknown.
        dying: it is being destroyed, and will never run again.
    """

    domid: int
    name: str
    uuid: str
    paused: bool = False
    shutdown: bool = False
    reason: str = "-"
    dying: bool = False

    @property
    def suspended(self) -> bool:
        """Whether its memory is as it was when it stopped, and it can be resumed."""
        return self.shutdown and self.reason == "s"

    def __str__(self) -> str:
        return f"{self.name} (id {self.domid})"


def read_list(text: str) -> list[XlDomain]:
    """All domains of a list; those that nobody has given a name (yet, or any more) are among them.

    Raises:
        HypervisorFailed: a line is not understood, or there are more than ``XL_DOMAINS_MAX``.
    """
    head, _, body = text.partition("\n")
    if tuple(head.split()) != _HEAD:
        raise HypervisorFailed(f"xl list -v begins with {head[:80]!r}, which is not understood: is it Xen's xl?")
    lines = body.removesuffix("\n").split("\n")
    if len(lines) > XL_DOMAINS_MAX:
        raise HypervisorFailed(f"xl list -v names more than {XL_DOMAINS_MAX} domains")
    domains: dict[int, XlDomain] = {}
    for line in lines:
        domain = _read_line(line)
        if domain.domid in domains:
            raise HypervisorFailed(f"xl list -v names the domain {domain.domid} twice: a name may contain a line break")
        domains[domain.domid] = domain
    return list(domains.values())


def _read_line(line: str) -> XlDomain:
    match = _LINE.fullmatch(line)
    if match is None:
        raise HypervisorFailed(f"a line of xl list -v is not understood: {line[:120]!r}")
    return XlDomain(
        domid=int(match["id"]),
        name=match["name"],
        uuid=match["uuid"],
        paused=match["paused"] == "p",
        shutdown=match["shutdown"] == "s",
        reason=match["reason"],
        dying=match["dying"] == "d",
    )
