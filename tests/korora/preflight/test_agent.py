"""How strict a relay is about what the checks find."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from korora.preflight.agent import HostSurveyor, open_surveyor
from korora.preflight.gather import Gatherer, XlInfo
from korora.watched import Unwatched
from proxy.errors import EXIT_POLICY, PreflightFailed, exit_code_of
from proxy.preflight import CHECKS, HostFacts

ROOMY = HostFacts(relay="1", machine="x86_64", features=("aes", "sse2"), room_bytes=2**40)


class Watch(Unwatched):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def surveyed(self, check: str, grade: str) -> None:
        self.seen.append((check, grade))


def surveyor(tmp_path: Path, **rest: Any) -> HostSurveyor:
    return HostSurveyor(Gatherer(tmp_path, root=tmp_path, xl=XlInfo), **rest)


def test_a_warning_is_told_and_refuses_where_it_is_strict(tmp_path: Path) -> None:
    lesser = msgspec.structs.replace(ROOMY, features=("sse2",))
    (told,) = surveyor(tmp_path).judge(ROOMY, lesser, departing=True)
    assert (told.check, told.grade) == ("cpu", "warning")
    assert surveyor(tmp_path).judge(ROOMY, lesser, departing=False) == ()  # it comes from there
    with pytest.raises(PreflightFailed, match=r"^preflight: cpu: .*lacks aes") as refused:
        surveyor(tmp_path, strict=True).judge(ROOMY, lesser, departing=True)
    assert exit_code_of(refused.value) == EXIT_POLICY
    assert refused.value.findings == (told,)
    assert refused.value.remedy == told.remedy


def test_what_failed_is_said_before_what_is_only_doubtful(tmp_path: Path) -> None:
    other = msgspec.structs.replace(ROOMY, features=(), machine="aarch64", room_bytes=100 * 2**20)
    for strict in (True, False):
        with pytest.raises(PreflightFailed, match=r"^preflight: architecture: ") as refused:
            surveyor(tmp_path, strict=strict).judge(ROOMY, other, departing=True)
        assert [finding.check for finding in refused.value.findings] == ["architecture", "room"]


def test_a_peer_that_says_nothing_is_let_through_by_the_strictest(tmp_path: Path) -> None:
    watch = Watch()
    assert surveyor(tmp_path, strict=True, watch=watch).judge(ROOMY, None, departing=True) == ()
    assert [check for check, _ in watch.seen] == list(CHECKS)
    assert {grade for check, grade in watch.seen if check != "room"} == {"unknown"}


def test_by_hand_nothing_refuses_and_nothing_is_counted(tmp_path: Path) -> None:
    watch = Watch()
    other = msgspec.structs.replace(ROOMY, machine="aarch64")
    found = surveyor(tmp_path, strict=True, watch=watch).survey(ROOMY, other, departing=True, need_bytes=1)
    assert [finding.check for finding in found if finding.grade == "failed"] == ["architecture"]
    assert watch.seen == []


@pytest.mark.parametrize(
    ("tcti", "tpm"),
    [("", ""), ("swtpm:host=127.0.0.1,port=1", "2.0"), ("device:{there}", "2.0"), ("device:{there}.not", "")],
)
def test_the_tpm_that_it_is_set_up_to_attest_by(tcti: str, tpm: str, tmp_path: Path) -> None:
    (tmp_path / "tpm").touch()
    made = surveyor(tmp_path, tcti=tcti.format(there=tmp_path / "tpm"))
    facts = made.facts()
    assert facts.tpm == tpm
    if tcti and not tpm:
        with pytest.raises(PreflightFailed, match="preflight: tpm: "):
            made.judge(msgspec.structs.replace(facts, room_bytes=2**40), None, departing=False)


def test_the_modes(tmp_path: Path) -> None:
    assert open_surveyor("off", tmp_path) is None
    on, strict = open_surveyor("on", tmp_path), open_surveyor("strict", tmp_path)
    assert on is not None
    assert strict is not None
    assert (on.strict, strict.strict) == (False, True)
    facts = on.facts()
    later = on.stamped(msgspec.structs.replace(facts, clock_ms=0))
    assert later.clock_ms >= facts.clock_ms
