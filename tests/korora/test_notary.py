"""What both hosts sign of a session, what each keeps, and what becomes of a host that lies."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from crypto.errors import HeadMalformed, LogForked, LogTruncated, LogUnusable, ReceiptError, SignatureInvalid
from crypto.identity import Identity
from crypto.pki import Authority
from crypto.receipts import dsse, statement
from crypto.receipts.bundle import Verified
from crypto.receipts.statement import Stage, Statement
from crypto.tls import TlsConfig
from korora.authority import Office
from korora.notary import RECEIPTS, RECOVERED, Deed, Notary
from korora.policy.file import PolicyFile
from korora.receipts import Given, Receipts, verify_file
from korora.watched import Unwatched
from proxy.authority import Act, Point, Question
from proxy.control import LogHead
from proxy.errors import EXIT_INTEGRITY, PolicyRefused, StreamCorrupt, exit_code_of
from proxy.handover.record import Entry, Head, Record
from proxy.report import SessionReport
from proxy.session import Role
from proxy.shell.journal import now
from tests.proxy.support import Middle, Pair, over_tcp, relays, run, until
from tests.standins.xen_host import guest_stream

STREAM = guest_stream("vm1")
QUESTION = Question(
    Point.OFFER, Role.SOURCE, "ab" * 16, peer="beta", pin="0" * 64, egress="default", tenant="", user=None
)


class Told(Unwatched):
    """A watch that remembers."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, str, bool]] = []
        self.failed = self.spared = 0
        self.disputes: list[type[ReceiptError]] = []

    def receipt_logged(self, role: str, stage: str, *, both: bool) -> None:
        self.logged.append((role, stage, both))

    def receipt_failed(self) -> None:
        self.failed += 1

    def receipt_spared(self) -> None:
        self.spared += 1

    def log_disputed(self, error: ReceiptError) -> None:
        self.disputes.append(type(error))


class Both:
    """Two hosts, whose logs outlive their sessions."""

    def __init__(self, folder: Path, client: TlsConfig, server: TlsConfig) -> None:
        self.folders = folder / "alpha", folder / "beta"
        for each in self.folders:
            each.mkdir(exist_ok=True)
        self.tls = client, server
        self.told = Told(), Told()
        self.notaries = tuple(
            Notary(tls.identity, each, told) for tls, each, told in zip(self.tls, self.folders, self.told, strict=True)
        )
        self.offices = tuple(
            Office(tls.identity.name, PolicyFile(None), each) for tls, each in zip(self.tls, self.folders, strict=True)
        )

    async def migrate(self, middle: Middle | None = None, resume_seconds: int = 0, stream: bytes = STREAM) -> Pair:
        hypervisors = over_tcp()
        try:
            async with relays(
                *self.tls,
                hypervisors.ingress,
                hypervisors.egress,
                peer_port=None if middle is None else middle.port,
                resume_seconds=resume_seconds,
                authorities=(self.offices[0], self.offices[1]),
                notaries=(self.notaries[0], self.notaries[1]),
            ) as pair:
                if middle is not None:
                    middle.start(pair.port)
                near, far = await pair.channel(hypervisors)
                await near.send(stream)
                near.shut()
                with suppress(ConnectionError):
                    await far.to_end()
                with suppress(OSError):
                    far.shut()
                with suppress(ConnectionError):
                    await near.to_end()
                await pair.ended()
                return pair
        finally:
            hypervisors.close()

    def entries(self, side: int) -> list[tuple[Statement, int]]:
        """Statements in one host's log, and how many have signed each."""
        found = []
        own = [one.own(tls.leaf_sha256.hex()).signer for one, tls in zip(self.notaries, self.tls, strict=True)]
        keys = {signer.keyid: signer.key for signer in own}
        for _, envelope in self.notaries[side].log.entries():
            found.append((statement.parse(envelope.payload), len(dsse.verify(envelope, keys))))
        return found


async def done(both: Both) -> None:
    """A migration that goes well."""
    assert [ended.error for ended in await (await both.migrate()).ended()] == [None, None]


@pytest.fixture
def both(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> Both:
    return Both(tmp_path, client_tls, server_tls)


@pytest.mark.parametrize("role", Role)
def test_who_was_greeted_before_a_reload_gets_the_signature_of_whom_it_met(
    both: Both, ca_dir: Path, role: Role
) -> None:
    """A daemon that is given a new certificate in the middle of a greeting must not sign as somebody else."""
    here = 0 if role is Role.SOURCE else 1
    name = both.tls[here].identity.name
    directory = both.folders[here] / "renewed"
    Authority.open(ca_dir).issue(name, now=datetime.now(UTC), out=directory)
    renewed = Identity.load(directory, now=datetime.now(UTC))
    both.notaries[here].reload(renewed)
    run(done(both))
    (_, signed), *_ = both.entries(here)
    assert signed == 2
    old = both.tls[here].identity
    party = getattr(both.entries(1 - here)[-1][0].predicate, role.value)
    assert party.pin == old.spki_sha256.hex() != renewed.spki_sha256.hex()


def test_three_receipts_of_both_stand_in_both_logs(both: Both) -> None:
    run(done(both))
    logs = both.entries(0), both.entries(1)
    assert [made.predicate.stage for made, _ in logs[0]] == [Stage.OFFER, Stage.TRANSFER, Stage.OUTCOME]
    assert logs[0] == logs[1]
    assert {signed for _, signed in logs[0]} == {2}
    for told, role in zip(both.told, ("source", "destination"), strict=True):
        assert told.logged == [(role, stage, True) for stage in ("offer", "transfer", "outcome")]
        assert (told.failed, told.disputes) == (0, [])
    offer, transfer, outcome = (made.predicate for made, _ in logs[0])
    assert offer.vm is None
    for one in (transfer, outcome):
        assert one.vm is not None
        assert one.vm.name == "vm1"
        points = [(decision.side, decision.point, decision.rule) for decision in one.decisions]
        assert points == [
            (side, point, "no policy")
            for side in ("source", "destination")
            for point in ("offer", "identity", "handover")
        ]
        assert [(each.subject, each.procedure) for each in one.procedures][:4] == [
            ("relay", "offer"),
            ("relay", "accept"),
            ("relay", "record"),
            ("relay", "identify"),
        ]
        assert one.heads.source.startswith("korora/")
        assert one.heads.destination.startswith("korora/")
    assert (transfer.outcome, outcome.outcome) == ("", "done")
    assert outcome.bytes.forward == len(STREAM)
    digests = {subject.name for made, _ in logs[0][2:] for subject in made.subject}
    assert digests == {"session", "channel/0/forward", "channel/0/backward"}


def test_the_next_session_proves_that_both_logs_have_only_grown(both: Both) -> None:
    for _ in range(3):
        run(done(both))
    assert len(both.entries(0)) == len(both.entries(1)) == 9
    for notary, peer in zip(both.notaries, ("beta", "alpha"), strict=True):
        (seen,) = notary.peers.known(peer)
        assert seen.head.size in (6, 7)


def test_each_log_verifies_and_is_exported_with_what_lies_beside_it(both: Both, identity_alpha: Path) -> None:
    """Certificates of both are kept, and the head that was signed last covers the outcome."""

    async def whole() -> None:
        for notary, ended in zip(both.notaries, await (await both.migrate()).ended(), strict=True):
            notary.ended(ended.report)

    run(whole())
    trust = Given.read(identity_alpha / "ca.crt", None, ())
    for folder in both.folders:
        receipts = Receipts(folder)
        found = receipts.audit()
        assert (found.findings, found.entries) == ([], 3)
        assert found.head is not None
        assert found.head.size == 3
        bundle = folder / "bundle.json"
        bundle.write_bytes(receipts.export(list(receipts.listed(0)), None))
        verified = verify_file(bundle, trust)
        assert isinstance(verified, Verified)
        assert [receipt.missing for _, receipt in verified.receipts] == [(), (), ()]


async def attempt(both: Both) -> tuple[BaseException | None, list[BaseException], Pair, bytes]:
    """A migration that is to fail: the source's error, the destination's, and what its hypervisor was given."""
    hypervisors = over_tcp()
    got = b""
    try:
        async with relays(
            *both.tls,
            hypervisors.ingress,
            hypervisors.egress,
            authorities=(both.offices[0], both.offices[1]),
            notaries=(both.notaries[0], both.notaries[1]),
        ) as pair:
            near = await hypervisors.connect()
            accepting = asyncio.ensure_future(hypervisors.accept())
            await near.send(STREAM)
            near.shut()
            await asyncio.wait({accepting, pair.source_ended}, return_when=asyncio.FIRST_COMPLETED)
            if accepting.done():
                far = accepting.result()
                with suppress(ConnectionError):
                    got = await far.to_end()
                with suppress(OSError):
                    far.shut()
            accepting.cancel()
            source = await pair.source_ended
            errors = list(pair.refused)
            if not errors:
                errors = [ended.error for ended in (await pair.ended())[1:] if ended.error is not None]
            return source.error, errors, pair, got
    finally:
        hypervisors.close()


def rewritten(folder: Path, keep: int) -> None:
    """The host's owner cuts its log, and what would betray that at home."""
    log = folder / RECEIPTS
    entries = (log / "entries").read_bytes().splitlines(keepends=True)
    for path in log.iterdir():
        if path.is_file():
            path.unlink()
    if keep:
        (log / "entries").write_bytes(b"".join(entries[:keep]))
        (log / "entries").chmod(0o600)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("keep", [0, 2])
def test_a_log_that_was_cut_is_found_by_the_peer_before_anything_is_sent(both: Both, side: int, keep: int) -> None:
    run(done(both))
    run(done(both))
    rewritten(both.folders[side], keep)
    error, there, _, got = run(attempt(both))
    found = error if side == 1 else there[0]
    assert isinstance(found, LogTruncated), found
    assert both.told[1 - side].disputes == [LogTruncated]
    assert both.told[side].disputes == []
    assert not got
    assert list((both.folders[1 - side] / RECEIPTS / "peers").glob("*.evidence"))
    assert error is not None


@pytest.mark.parametrize("side", [0, 1])
def test_a_log_that_was_forked_is_found_by_the_peer(both: Both, side: int) -> None:
    run(done(both))
    run(done(both))
    before = (both.folders[side] / RECEIPTS / "entries").read_bytes()
    rewritten(both.folders[side], 0)
    other = Notary(both.tls[side].identity, both.folders[side])
    envelope = both.notaries[1 - side].log.entry(2)
    for _ in range(before.count(b"\n") + 1):
        other.log.append(envelope)
    error, there, _, got = run(attempt(both))
    found = error if side == 1 else there[0]
    assert isinstance(found, LogForked), found
    assert both.told[1 - side].disputes == [LogForked]
    assert both.told[side].disputes == []
    assert not got


def lying(method: str, change: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The source states something else than it did, and signs it."""
    honest = getattr(Deed, method)

    def lie(self: Deed, *args: Any) -> Any:
        answer = honest(self, *args)
        receipt = answer.receipt if method == "offer" else answer
        made = json.loads(dsse.decode(receipt).payload)
        change(made)
        content = msgspec.json.Encoder(order="deterministic").encode(msgspec.convert(made, Statement))
        envelope = dsse.sign(content, self._identity.signing_key)
        self._sent = dsse.encode(envelope)
        return msgspec.structs.replace(answer, receipt=self._sent) if method == "offer" else self._sent

    monkeypatch.setattr(Deed, method, lie)


FORGED = {"side": "destination", "point": "offer", "rule": "everybody", "allowed": True, "reason": "", "approvers": [0]}

LIES: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "another session": ("offer", lambda made: made["predicate"].update(session="ff" * 16)),
    "another source": ("offer", lambda made: made["predicate"]["source"].update(name="gamma")),
    "another destination": ("offer", lambda made: made["predicate"]["destination"].update(name="gamma")),
    "another key": ("offer", lambda made: made["predicate"]["source"].update(pin="0" * 64)),
    "another stage": ("offer", lambda made: made["predicate"].update(stage="transfer")),
    "a decision before any": ("offer", lambda made: made["predicate"].update(decisions=[FORGED])),
    "a policy before any": ("offer", lambda made: made["predicate"]["policies"].update(destination="ab" * 32)),
    "a machine before any": ("offer", lambda made: made["predicate"].update(vm={"name": "vm1", "uuid": ""})),
    "an end before the beginning": ("offer", lambda made: made["predicate"].update(outcome="done")),
    "another head": ("state", lambda made: made["predicate"]["heads"].update(source="korora/alpha")),
    "no head": ("state", lambda made: made["predicate"]["heads"].update(destination="")),
    "an end before the end": ("state", lambda made: made["predicate"].update(outcome="done")),
    "a procedure less": ("state", lambda made: made["predicate"]["procedures"].pop()),
    "more bytes in the end": ("conclude", lambda made: made["predicate"]["bytes"].update(forward=1 << 40)),
    "another machine": ("state", lambda made: made["predicate"]["vm"].update(name="vm2")),
    "other bytes": ("state", lambda made: made["subject"][1]["digest"].update(blake3="00" * 32)),
    "a channel that never was": ("state", lambda made: made["subject"][1].update(name="channel/7/forward")),
    "the destination's policy": ("state", lambda made: made["predicate"]["policies"].update(destination="ab" * 32)),
    "the destination's decision": ("state", lambda made: made["predicate"]["decisions"][3].update(rule="other")),
    "a decision less": ("state", lambda made: made["predicate"]["decisions"].pop()),
    "somebody else began it": ("state", lambda made: made["predicate"]["source"].update(user=4242)),
    "a vTPM that never moved": (
        "state",
        lambda made: made["subject"].append({"name": "vtpm/1", "digest": {"sha256": "00" * 32}}),
    ),
    "no digest of a stream": ("state", lambda made: made["subject"].pop()),
    "no digest in the end": ("conclude", lambda made: made["subject"].pop()),
    "it failed": ("conclude", lambda made: made["predicate"].update(outcome="failed")),
    "other bytes in the end": ("conclude", lambda made: made["subject"][1]["digest"].update(blake3="00" * 32)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_source_that_states_what_was_not_seen_gets_no_signature(
    both: Both, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying(*LIES[lie], monkeypatch)
    error, there, _, got = run(attempt(both))
    assert error is not None
    assert there
    assert exit_code_of(error) != 0
    assert isinstance(there[0], StreamCorrupt | ReceiptError) or "state" in str(there[0]) or "receipt" in str(there[0])
    signed_by_both = [made.predicate.stage for made, signed in both.entries(1) if signed == 2]
    stage = {"offer": Stage.OFFER, "state": Stage.TRANSFER, "conclude": Stage.OUTCOME}[LIES[lie][0]]
    assert stage not in signed_by_both
    if stage is Stage.OFFER:
        assert not got


def test_a_destination_that_signs_something_else_is_not_believed(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Deed.countersign

    def other(self: Deed, receipt: bytes, digests: Sequence[str]) -> bytes:
        honest(self, receipt, digests)
        envelope = dsse.decode(receipt)
        forged = replace(envelope, payload=envelope.payload.replace(b"vm1", b"vm2"))
        return dsse.encode(dsse.countersign(forged, self._identity.signing_key))

    monkeypatch.setattr(Deed, "countersign", other)
    error, _, _, _ = run(attempt(both))
    assert isinstance(error, SignatureInvalid), error
    assert exit_code_of(error) == EXIT_INTEGRITY
    assert [made.predicate.stage for made, signed in both.entries(0) if signed == 2] == [Stage.OFFER]


@pytest.mark.parametrize("without", [0, 1])
def test_a_peer_that_signs_nothing_is_refused(both: Both, without: int) -> None:
    async def story() -> None:
        hypervisors = over_tcp()
        signs: list[Notary | None] = list(both.notaries)
        signs[without] = None
        try:
            async with relays(
                *both.tls, hypervisors.ingress, hypervisors.egress, notaries=(signs[0], signs[1])
            ) as pair:
                near = await hypervisors.connect()
                await near.send(STREAM)
                source = await pair.source_ended
                assert source.error is not None
                assert "signs no receipts" in str(source.error)
        finally:
            hypervisors.close()

    run(story())


def test_a_session_that_was_refused_leaves_a_receipt_at_both_ends(both: Both, tmp_path: Path) -> None:
    path = tmp_path / "no.toml"
    path.write_text('[[rule]]\nname = "nobody"\neffect = "deny"\n')
    path.chmod(0o600)
    both.offices[1].reload(PolicyFile(path))
    error, _, _, _ = run(attempt(both))
    assert isinstance(error, PolicyRefused)
    ((made, signed),) = both.entries(1)
    assert signed == 1
    assert made.predicate.outcome == "refused"
    assert both.told[1].logged == [("destination", "outcome", False)]
    assert made.predicate.decisions[-1].rule == "nobody"
    assert not made.predicate.decisions[-1].allowed
    assert "nobody" in made.predicate.error


def test_an_outcome_that_the_log_does_not_take_is_told_and_counted(both: Both) -> None:
    async def story() -> None:
        ended = (await (await both.migrate()).ended())[0]
        both.notaries[0].begin(QUESTION, ended.report)  # as if it had not been concluded
        (both.folders[0] / RECEIPTS / "entries").unlink()
        (both.folders[0] / RECEIPTS / "entries").mkdir()
        both.notaries[0].ended(ended.report)

    with capture_logs() as said:
        run(story())
    assert [one["log_level"] for one in said if one["event"] == "a session's outcome cannot be logged"] == ["error"]
    assert both.told[0].failed == 1
    assert [both_signed for _, _, both_signed in both.told[0].logged] == [True] * 3


def test_a_head_that_is_none_is_a_dispute_and_a_disk_that_refuses_is_not(both: Both) -> None:
    run(done(both))
    deed = both.notaries[0].begin(
        QUESTION, SessionReport(role="source", session_id="ab" * 16, started=datetime.now(UTC))
    )
    deed._peer = both.notaries[1].own().signer
    with pytest.raises(HeadMalformed):
        deed._follow(LogHead("no head", ()))
    assert both.told[0].disputes == [HeadMalformed]
    text, proofs = both.notaries[1].log.prove((), "beta", both.tls[1].identity.signing_key)
    peers = both.folders[0] / RECEIPTS / "peers"
    (peers / "lock").unlink()
    (peers / "lock").mkdir()
    with pytest.raises(LogUnusable):
        deed._follow(LogHead(text, proofs))
    assert both.told[0].disputes == [HeadMalformed]


@pytest.mark.parametrize("seed", range(24))
def test_a_connection_lost_at_any_moment_repeats_nothing_in_the_logs(both: Both, seed: int) -> None:
    async def story() -> list[BaseException | None]:
        middle = Middle()
        try:
            going = asyncio.create_task(both.migrate(middle, 20))
            await until(lambda: middle.living(lanes=True))
            for _ in range(3):
                await asyncio.sleep(0.002 * seed)
                for number in middle.living(lanes=False):
                    await middle.cut(number, reset=bool(seed % 2))
            return [ended.error for ended in await (await going).ended()]
        finally:
            await middle.close()

    errors = run(story())
    for side in (0, 1):
        counts = Counter((made.predicate.stage, signed) for made, signed in both.entries(side))
        assert not counts or max(counts.values()) == 1, counts
        if errors == [None, None]:
            assert counts[Stage.OFFER, 2] == counts[Stage.TRANSFER, 2] == 1
            assert counts[Stage.OUTCOME, 2] == 1 or (side == 0 and not counts[Stage.OUTCOME, 2])


@pytest.mark.parametrize(
    ("side", "state", "outcome"), [("source", "done", "done"), ("destination", "aborted", "aborted")]
)
def test_a_hand_over_that_was_decided_after_its_session_is_put_on_record(
    both: Both, side: str, state: str, outcome: str
) -> None:
    notary = both.notaries[0]
    head = Head("5e" * 16, side, "xl", "beta", now())  # type: ignore[arg-type]
    record = Record(head, [Entry("open", now(), name="vm1", uuid=""), Entry(state, now(), why="the source says so")])  # type: ignore[arg-type]
    assert not notary.knows(record)
    acts = (Act("relay", "recover", ("journal", "memory")), Act("uid:1001", "resolve", ("journal", "reason")))
    notary.settled(record, acts)
    assert both.told[0].logged == [(side, "outcome", False)]
    ((made, signed),) = both.entries(0)
    assert signed == 1
    told = made.predicate
    assert (told.stage, told.outcome, told.flags, told.error) == (
        Stage.OUTCOME,
        outcome,
        (RECOVERED,),
        "the source says so",
    )
    assert (told.source.name, told.destination.name) == (("alpha", "beta") if side == "source" else ("beta", "alpha"))
    assert tuple(Act(one.subject, one.procedure, one.items) for one in told.procedures) == acts
    assert told.vm is not None
    assert told.vm.name == "vm1"
