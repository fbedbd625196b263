"""ENDPOINT as people write it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.endpoints.files import FileEgress, FileIngress
from proxy.endpoints.pipes import ExecEndpoint, StdioEndpoint
from proxy.endpoints.sockets import TcpEgress, TcpIngress, UnixEgress, UnixIngress
from proxy.endpoints.spec import UNIX_PATH_BYTES_MAX, parse_address, parse_egress, parse_ingress
from proxy.endpoints.xl import XlEgress
from proxy.errors import ConfigurationError

ENDPOINTS = st.one_of(
    st.text(max_size=60),
    st.builds("{}:{}".format, st.sampled_from(["tcp", "unix", "stdio", "file", "exec", "xl"]), st.text(max_size=120)),
    st.builds("tcp:{}:{}".format, st.text(max_size=20), st.integers(-1, 100_000)),
)


@pytest.mark.parametrize(
    ("text", "ingress", "egress"),
    [
        ("tcp:127.0.0.1:4444", TcpIngress, TcpEgress),
        ("tcp:[::1]:4444", TcpIngress, TcpEgress),
        ("tcp::4444", TcpIngress, TcpEgress),
        ("unix:/run/vm.sock", UnixIngress, UnixEgress),
        ("unix:" + "x" * UNIX_PATH_BYTES_MAX, UnixIngress, UnixEgress),
        ("stdio:", StdioEndpoint, StdioEndpoint),
        ("file:/tmp/a:b", FileIngress, FileEgress),
        ("exec:cat | wc", ExecEndpoint, ExecEndpoint),
    ],
)
def test_each_form(text: str, ingress: type, egress: type) -> None:
    assert type(parse_ingress(text)) is ingress
    assert type(parse_egress(text)) is egress
    assert parse_egress(text).label == text
    assert parse_ingress(text).label == text


def test_a_tcp_ingress_may_leave_its_port_to_the_kernel_and_an_egress_may_not() -> None:
    assert isinstance(parse_ingress("tcp:127.0.0.1:0"), TcpIngress)
    with pytest.raises(ConfigurationError, match="port 0"):
        parse_egress("tcp:127.0.0.1:0")


@pytest.mark.parametrize(
    ("text", "flags"), [("xl:", ""), ("xl:-d", "d"), ("xl:-e -d -p", "edp"), ("xl:-edp", "edp"), ("xl:p", "p")]
)
def test_xl_takes_its_own_flags(text: str, flags: str) -> None:
    egress = parse_egress(text)
    assert isinstance(egress, XlEgress)
    assert egress._flags == flags


@pytest.mark.parametrize("text", ["xl:-x", "xl:--debug", "xl:-e\n", "xl:;id", "xl:-eeee"])
def test_xl_takes_no_other_words(text: str) -> None:
    with pytest.raises(ConfigurationError, match="xl"):
        parse_egress(text)


def test_xl_is_no_ingress() -> None:
    with pytest.raises(ConfigurationError):
        parse_ingress("xl:")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp",
        "tcp:",
        "tcp:host",
        "tcp:host:",
        "tcp:host:65536",
        "tcp:host:1\n",
        "tcp:h o:1",
        "tcp:::1:1",
        "tcp:[::1:1",
        "udp:host:1",
        "unix:",
        "unix:a\x00b",
        "file:",
        "stdio:x",
        "exec:",
        "exec:  ",
        "/run/vm.sock",
        "TCP:host:1",
        "unix:" + "x" * (UNIX_PATH_BYTES_MAX + 1),
        "unix:" + "é" * 54,
    ],
)
def test_what_is_no_endpoint(text: str) -> None:
    for parse in (parse_ingress, parse_egress):
        with pytest.raises(ConfigurationError) as refused:
            parse(text)
        assert refused.value.remedy, "every error says what to do"


@given(ENDPOINTS)
def test_any_text_is_an_endpoint_or_a_configuration_error(text: str) -> None:
    for parse in (parse_ingress, parse_egress):
        try:
            endpoint = parse(text)
        except ConfigurationError as error:
            remedy = error.remedy
        else:
            remedy = endpoint.label
        assert remedy


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.0.2.7:8010", "192.0.2.7", 8010),
        ("[2001:db8::7]:1", "2001:db8::7", 1),
        (":8010", "", 8010),
        ("a:0", "a", 0),
        ("[fe80::1%eth0]:65535", "fe80::1%eth0", 65535),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text, "--listen") == (host, port)


@pytest.mark.parametrize("text", ["", ":", "host", "1:2:3", "[::1]", "host:-1", "host:１", "host:80 ", " host:80"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--listen"):
        parse_address(text, "--listen")
