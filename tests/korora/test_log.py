"""Logs: on standard error, in two forms, and without secrets."""

import json
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from korora.log import LogFormat, LogLevel, hide_secrets


def logged(code: str, log_format: LogFormat = LogFormat.JSON, level: LogLevel = LogLevel.DEBUG) -> tuple[str, str]:
    """What a process that logs so writes to standard output and error; logging is set up once a process."""
    program = (
        "import warnings; warnings.simplefilter('error')\n"
        "from korora.log import LogFormat, LogLevel, configure\n"
        f"configure(LogFormat({log_format.value!r}), LogLevel({level.value!r}))\n"
        "import structlog\nlog = structlog.get_logger('test')\n" + code
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_json_lines_on_standard_error() -> None:
    out, err = logged("log.info('listening', address='127.0.0.1:8010', n=3)\nlog.warning('second')")
    assert out == ""
    first, second = (json.loads(line) for line in err.splitlines())
    assert (first["event"], first["level"], first["address"], first["n"]) == ("listening", "info", "127.0.0.1:8010", 3)
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["level"]) == ("second", "warning")


def test_plain_lines_for_people_where_there_is_no_terminal() -> None:
    out, err = logged("log.info('session done', seconds=1.5)", LogFormat.CONSOLE)
    assert out == ""
    assert "session done" in err
    assert "seconds=1.5" in err
    assert "\x1b" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_no_control_character_of_a_peers(log_format: LogFormat) -> None:
    _, err = logged("log.warning('refused', reason='no field `\\x1b[2J`\\nof theirs', n=[1])", log_format)
    assert "no field `?[2J`?of theirs" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("level", list(LogLevel))
def test_levels(level: LogLevel) -> None:
    _, err = logged("\n".join(f"log.{each.value}('{each.value}')" for each in LogLevel), level=level)
    order = list(LogLevel)
    assert [json.loads(line)["event"] for line in err.splitlines()] == [
        each.value for each in order[order.index(level) :]
    ]


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_no_secret_in_a_log_nor_in_its_traceback(log_format: LogFormat) -> None:
    """A traceback shows lines of code and never the values they worked on."""
    code = (
        "exporter = b'very secret'\n"
        "log.info('made', key='very secret', lane_token='very secret', exporter=exporter, data=exporter)\n"
        "log = log.bind(password='very secret')\n"
        "log.info('bound')\n"
        "def fails(secret_key):\n"
        "    raise ValueError('a bug')\n"
        "try:\n"
        "    fails(exporter)\n"
        "except ValueError as error:\n"
        "    log.debug('internal error', exc_info=error)\n"
    )
    out, err = logged(code, log_format)
    assert "very secret" not in out + err
    assert "a bug" in err
    assert err.count("(hidden)") >= 4


@given(
    st.dictionaries(
        st.sampled_from(
            ["event", "key", "API_Key", "token", "x_token_y", "secret", "exporter", "Password", "peer", "n"]
        ),
        st.one_of(st.text(), st.integers(), st.binary(), st.none()),
    )
)
def test_what_smells_of_a_secret_is_hidden_and_the_rest_is_kept(event: dict[str, object]) -> None:
    shown = hide_secrets(None, "info", dict(event))
    assert set(shown) == set(event)
    for name, value in event.items():
        suspect = isinstance(value, bytes) or name not in {"event", "peer", "n"}
        assert shown[name] == ("(hidden)" if suspect else value)


@pytest.mark.parametrize(
    "value",
    [
        bytearray(b"very secret"),
        memoryview(b"very secret"),
        [b"very secret"],
        (b"very secret",),
        {"a": b"very secret"},
        {"key": "very secret"},
        {"a": [{"token": "very secret"}]},
    ],
)
def test_secrets_within_values_are_hidden_too(value: object) -> None:
    assert "very secret" not in repr(hide_secrets(None, "info", {"event": "made", "value": value}))


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_a_line_is_written_in_one_piece(log_format: LogFormat) -> None:
    """Several processes share the stream: a line's end that is written apart comes behind another's beginning."""
    program = (
        "from korora import errors, log\n"
        f"log.configure(log.LogFormat({log_format.value!r}), log.LogLevel.INFO)\n"
        "import structlog\n"
        "structlog.get_logger('x').info('first', size=3000 * 'x')\n"
        "errors.complain(ValueError('second'))\n"
    )
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # it keeps the writes apart
    with near, far:
        near.settimeout(30)
        subprocess.run([sys.executable, "-c", program], stderr=far, timeout=30, check=True)
        for word in (b"first", b"second"):
            line = near.recv(8192)
            assert word in line
            assert line.count(b"\n") == 1
            assert line.endswith(b"\n")
