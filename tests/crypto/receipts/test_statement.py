"""Statements: one spelling for one content, and nothing that is out of its bounds."""

import json
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement as TheirStatement

from crypto.errors import ReceiptMalformed
from crypto.receipts.limits import STATEMENT_BYTES_MAX, SUBJECTS_MAX
from crypto.receipts.statement import (
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    Attestation,
    Decision,
    Heads,
    Octets,
    Party,
    Policies,
    Predicate,
    Procedure,
    Stage,
    build,
    parse,
    session_digest,
)
from tests.crypto.receipts.making import predicate, statement

WORDS = st.text(max_size=40)
SIDES = st.sampled_from(["source", "destination"])
COUNTS = st.integers(0, 2**63 - 1)
DIGESTS = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
PARTIES = st.builds(
    Party,
    name=st.text("abc123", min_size=1, max_size=20),
    pin=DIGESTS | st.just(""),
    user=st.none() | st.integers(0, 2**32 - 1),
)
PREDICATES = st.builds(
    Predicate,
    stage=st.sampled_from(Stage),
    session=st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    source=PARTIES,
    destination=PARTIES,
    vm=st.none(),
    started=st.datetimes().map(lambda moment: moment.isoformat(timespec="milliseconds") + "+00:00"),
    ended=st.none(),
    policies=st.builds(Policies, DIGESTS, DIGESTS),
    decisions=st.lists(
        st.builds(Decision, SIDES, st.sampled_from(["offer", "identity", "handover"]), WORDS, st.booleans(), WORDS),
        max_size=5,
    ).map(tuple),
    procedures=st.lists(st.builds(Procedure, WORDS, WORDS), max_size=5).map(tuple),
    attestations=st.lists(st.builds(Attestation, SIDES, WORDS, st.booleans()), max_size=3).map(tuple),
    pages=st.dictionaries(WORDS, COUNTS, max_size=8),
    bytes=st.builds(Octets, COUNTS, COUNTS),
    outcome=st.sampled_from(["", "done", "refused", "failed", "aborted", "doubt"]),
    error=WORDS,
    flags=st.lists(WORDS, max_size=4).map(tuple),
    heads=st.builds(Heads, WORDS, WORDS),
)


@given(PREDICATES, st.dictionaries(WORDS, st.dictionaries(WORDS, DIGESTS, min_size=1, max_size=2), max_size=4))
def test_what_is_built_is_read_back(made: Predicate, digests: dict[str, dict[str, str]]) -> None:
    digests.pop("session", None)
    content = build(made, digests)
    assert content == build(made, digests)
    read = parse(content)
    assert read.predicate == made
    assert {one.name: one.digest for one in read.subject} == digests | {"session": session_digest(made.session)}


def test_it_is_an_in_toto_statement() -> None:
    told = json.loads(statement())
    assert list(told) == ["_type", "subject", "predicateType", "predicate"]
    assert (told["_type"], told["predicateType"]) == (STATEMENT_TYPE, PREDICATE_TYPE)
    assert told["subject"][1] == {"name": "channel/0/forward", "digest": {"blake3": "0" * 64}}


def edited(*path: str | int, to: object) -> bytes:
    """The statement with one value changed, spelled as ours are."""
    told: Any = json.loads(statement())
    at = told
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = to
    return msgspec.json.encode(told)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff",
        b" " * (STATEMENT_BYTES_MAX + 1),
        b" " + statement(),
        statement().replace(b'"stage"', b'"session":"","stage"'),
        edited("_type", to="https://in-toto.io/Statement/v0.1"),
        edited("predicateType", to="urn:korora:migration:v2"),
        edited("more", to=1),
        edited("predicate", "more", to=1),
        edited("predicate", "stage", to="later"),
        edited("predicate", "session", to="AB" * 16),
        edited("predicate", "session", to="00" * 15 + "01"),  # not the session that is the subject
        edited("predicate", "started", to="yesterday"),
        edited("predicate", "source", "name", to=""),
        edited("predicate", "source", "pin", to="00"),
        edited("predicate", "source", "user", to=-1),
        edited("predicate", "bytes", "forward", to=-1),
        edited("predicate", "bytes", "forward", to=2**63),
        edited("predicate", "bytes", "forward", to=1.5),
        edited("predicate", "outcome", to="well"),
        edited("predicate", "error", to="x" * 513),
        edited("predicate", "pages", to={str(number): 0 for number in range(17)}),
        edited("subject", to=[]),
        edited("subject", 0, "name", to="another"),
        edited("subject", 1, "name", to="session"),
        edited("subject", 1, "digest", to={}),
        edited("subject", 1, "digest", to={"blake3": "0"}),
    ],
)
def test_what_is_no_statement_of_ours_is_refused(content: bytes) -> None:
    with pytest.raises(ReceiptMalformed):
        parse(content)


def test_a_value_out_of_bounds_is_not_built() -> None:
    with pytest.raises(ReceiptMalformed, match="error"):
        build(msgspec.structs.replace(predicate(), error="x" * 513), {})
    with pytest.raises(ReceiptMalformed, match="subject"):
        build(predicate(), {str(number): {"blake3": "00"} for number in range(SUBJECTS_MAX)})
    with pytest.raises(ReceiptMalformed, match="session"):
        build(msgspec.structs.replace(predicate(), session="x"), {})


def test_the_digests_of_as_many_channels_as_there_are_fit() -> None:
    digests = {
        f"channel/{number}/{way}": {"blake3": "f" * 64} for number in range(64) for way in ("forward", "backward")
    }
    assert len(build(predicate(), digests)) < STATEMENT_BYTES_MAX * 2 // 3


# ---- another implementation


def test_in_toto_s_own_library_reads_and_validates_our_statements() -> None:
    digests = {"channel/0/forward": {"blake3": "ab" * 32}, "disk/xvda": {"sha256": "cd" * 32}}
    theirs = TheirStatement.copy_from_pb(json_format.Parse(build(predicate(), digests), statement_pb2.Statement()))
    theirs.validate()
    assert theirs.pb.predicate_type == PREDICATE_TYPE
    assert [one.name for one in theirs.pb.subject] == ["session", *digests]
    assert json_format.MessageToDict(theirs.pb)["predicate"]["outcome"] == "done"
    theirs.pb.subject.clear()
    with pytest.raises(ValueError, match="subject"):
        theirs.validate()
