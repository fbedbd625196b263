"""A configuration that is wrong is refused by file, key and what was expected there; one that is right says it all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from korora.daemon import config
from korora.errors import remedy_of
from proxy.errors import ConfigurationError

WHERE = "/etc/korora/korora.toml"
PEER = '[[peer]]\nname = "host-b"\naddress = "host-b:8010"\n'
INGRESS = '[[ingress]]\nname = "vm1"\nfrom = "tcp:127.0.0.1:4440"\npeer = "host-b"\n'
EGRESS = '[[egress]]\nname = "vm1"\nto = "tcp:127.0.0.1:4444"\n'
GOOD = PEER + INGRESS + EGRESS
XL = PEER + '[xl]\nsocket = "/run/xl.sock"\n'


def parse(text: str) -> config.Config:
    return config.parse(text.encode(), WHERE)


def test_what_is_left_out_has_its_default() -> None:
    made = parse(GOOD)
    assert (made.identity, made.state) == ("/etc/korora/identity", "/var/lib/korora")
    assert (made.control, made.listen.address) == ("/run/korora/control.sock", ":8010")
    assert (made.workers, made.sessions_max, made.allow_classical) == (0, 64, False)
    assert made.limits == config.Limits()
    assert made.metrics.address == "127.0.0.1:9464"
    assert (made.pages.cache_bytes, made.pages.chains, made.pages.store_bytes) == (512 * 2**20, 2, 20 * 2**30)
    (ingress,), (egress,), (peer,) = made.ingress, made.egress, made.peer
    assert (ingress.egress, ingress.lanes, ingress.priority, ingress.rate_limit) == ("default", 1, "normal", None)
    assert (ingress.encode, ingress.tenant) == ("auto", "default")
    assert (egress.peers, egress.tenant, peer.pins) == ((), "default", ())
    assert made.peer_named("host-b") is peer
    assert (made.ingress_named("vm1"), made.ingress_named("vm2")) == (ingress, None)
    assert (made.egress_named("vm1"), made.egress_named("vm2")) == (egress, None)


def test_korora_xl_has_its_defaults_and_is_off_without_a_socket() -> None:
    made = parse(XL)
    xl = made.xl
    assert (xl.sessions_max, xl.peers, xl.any_address, xl.egress) == (16, (), False, "default")
    assert (xl.lanes, xl.priority, xl.rate_limit, xl.encode, xl.tenant) == (1, "normal", None, "auto", "default")
    assert made.departure_named("xl") is xl
    assert [peer.name for peer in made.xl_peers()] == ["host-b"]
    assert parse(GOOD).departure_named("xl") is None
    named = parse(GOOD + INGRESS.replace("vm1", "xl").replace("4440", "4441"))
    assert named.departure_named("xl") is named.ingress_named("xl")


NAME = "a name of 1 to 63 letters, digits, dots, dashes and underscores, a letter or digit first"
RATE = 'an integer of bytes a second, ≥ 1024, or a string like "200 MiB/s"'
PIN = "ab" * 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # types and bounds
        (
            GOOD.replace("4440", "4440", 1) + "lanes = 1",
            "egress[0].lanes: no such key; expected one of name, peers, qmp, require_guarded, tenant, to",
        ),
        (PEER + INGRESS + "lanes = 40", "ingress[0].lanes: expected int ≥ 1 and ≤ 16, got 40"),
        (PEER + INGRESS + "lanes = 0", "ingress[0].lanes: expected int ≥ 1 and ≤ 16, got 0"),
        (PEER + INGRESS + 'lanes = "4"', "ingress[0].lanes: expected int ≥ 1 and ≤ 16, got '4'"),
        (PEER + INGRESS + "lanes = true", "ingress[0].lanes: expected int ≥ 1 and ≤ 16, got true"),
        (PEER + INGRESS + "lanes = 4.0", "ingress[0].lanes: expected int ≥ 1 and ≤ 16, got 4.0"),
        (PEER + INGRESS + "lanes = [4]", "ingress[0].lanes: expected int ≥ 1 and ≤ 16, got a list of 1"),
        (
            PEER + INGRESS + 'priority = "urgent"',
            'ingress[0].priority: expected one of "high", "low", "normal", got \'urgent\'',
        ),
        (PEER + INGRESS + "rate_limit = 3", f"ingress[0].rate_limit: expected {RATE}, got 3"),
        (PEER + INGRESS + 'rate_limit = "3 MiB"', f"ingress[0].rate_limit: expected {RATE}, got '3 MiB'"),
        (PEER + INGRESS + 'rate_limit = "8 kbit/s"', f"ingress[0].rate_limit: expected {RATE}, got '8 kbit/s'"),
        (GOOD.replace('"vm1"', '"vm/1"'), f"ingress[0].name: expected {NAME}, got 'vm/1'"),
        (GOOD.replace('"host-b"\naddress', '"host b"\naddress'), f"peer[0].name: expected {NAME}, got 'host b'"),
        (PEER + 'pins = ["00"]\n' + INGRESS, "peer[0].pins[0]: expected a SHA-256 of 64 hexadecimal digits, got '00'"),
        (
            PEER + f'pins = ["{PIN}", 7]\n' + INGRESS,
            "peer[0].pins[1]: expected a SHA-256 of 64 hexadecimal digits, got 7",
        ),
        (PEER + 'pins = "x"\n' + INGRESS, "peer[0].pins: expected a list, got 'x'"),
        ("workers = 65\n" + GOOD, "workers: expected int ≥ 0 and ≤ 64, got 65"),
        ("sessions_max = 0\n" + GOOD, "sessions_max: expected int ≥ 1 and ≤ 1024, got 0"),
        ('allow_classical = "yes"\n' + GOOD, "allow_classical: expected true or false, got 'yes'"),
        ("identity = 7\n" + GOOD, "identity: expected a string, got 7"),
        ("[limits]\nresume_timeout = 3601\n" + GOOD, "limits.resume_timeout: expected int ≥ 0 and ≤ 3600, got 3601"),
        ("[limits]\ndrain_timeout = -1\n" + GOOD, "limits.drain_timeout: expected int ≥ 0 and ≤ 86400, got -1"),
        ("[pages]\ncache_bytes = -1\n" + GOOD, "pages.cache_bytes: expected int ≥ 0 and ≤ 274877906944, got -1"),
        (
            '[pages]\ncache_bytes = "1 GiB"\n' + GOOD,
            "pages.cache_bytes: expected int ≥ 0 and ≤ 274877906944, got '1 GiB'",
        ),
        ("[pages]\nchains = 17\n" + GOOD, "pages.chains: expected int ≥ 1 and ≤ 16, got 17"),
        ("[pages]\nstore_bytes = -1\n" + GOOD, "pages.store_bytes: expected int ≥ 0 and ≤ 1125899906842624, got -1"),
        ("[pages]\ncache = 1\n" + GOOD, "pages.cache: no such key; expected one of cache_bytes, chains, store_bytes"),
        (
            PEER + INGRESS + 'encode = "zstd"',
            'ingress[0].encode: expected one of "auto", "best", "opaque", "pages", got \'zstd\'',
        ),
        (PEER + INGRESS + 'tenant = ""', f"ingress[0].tenant: expected {NAME}, got ''"),
        (PEER + EGRESS + 'tenant = "a/b"', f"egress[0].tenant: expected {NAME}, got 'a/b'"),
        ("listen = 8010\n" + GOOD, "listen: expected a table, got 8010"),
        ('ingress = "x"\n' + PEER, "ingress: expected tables in double brackets, at most 512, got 'x'"),
        # keys
        ("worker = 1\n" + GOOD, "worker: no such key; expected one of allow_classical, approvals, attestation, "),
        ("[limits]\nrate = 1\n" + GOOD, "limits.rate: no such key; expected one of drain_timeout, rate_limit, "),
        (
            PEER + INGRESS.replace("from", "source"),
            "ingress[0].source: no such key; expected one of egress, encode, from, ",
        ),
        (PEER + INGRESS.partition("peer = ")[0], f"ingress[0].peer: missing; expected {NAME}"),
        ("[[egress]]\n" + PEER, f"egress[0].name: missing; expected {NAME}"),
        # what the types cannot say
        (PEER, "ingress: there is neither an [[ingress]] nor an [[egress]]"),
        (INGRESS, "ingress[0].peer: 'host-b' is no [[peer]] of this file"),
        (PEER.partition("address")[0] + INGRESS, "ingress[0].peer: peer 'host-b' has no address"),
        (PEER + EGRESS + 'peers = ["host-b", "host-c"]', "egress[0].peers[1]: 'host-c' is no [[peer]] of this file"),
        (EGRESS, "egress[0]: nobody could use it: there is no [[peer]]"),
        (PEER + PEER + INGRESS, "peer: 2 entries have the name 'host-b'"),
        (PEER + INGRESS + INGRESS.replace("4440", "4441"), "ingress: 2 entries have the name 'vm1'"),
        (PEER + INGRESS + INGRESS.replace("vm1", "vm2"), "ingress: 2 entries have the from 'tcp:127.0.0.1:4440'"),
        (PEER + EGRESS + EGRESS, "egress: 2 entries have the name 'vm1'"),
        (GOOD.replace("host-b:8010", "host-b"), "peer[0].address: the address 'host-b' is no HOST:PORT"),
        (GOOD.replace("host-b:8010", ":8010"), "peer[0].address: expected HOST:PORT with a host, got ':8010'"),
        (PEER + INGRESS + 'qmp = "/run/q"', "ingress[0].qmp: '/run/q' is no monitor"),
        (PEER + INGRESS + 'qmp = "unix:q"', "ingress[0].qmp: expected an absolute path, got 'q'"),
        (
            PEER + INGRESS + 'qmp = "unix:/q"\nxl_flags = ""',
            "ingress[0].qmp: what comes by an ingress with xl_flags is xl",
        ),
        (PEER + EGRESS + 'qmp = "tcp:127.0.0.1:4"', "egress[0].qmp: 'tcp:127.0.0.1:4' is no monitor"),
        (PEER + EGRESS + f'qmp = "unix:/{"q" * 107}"', "egress[0].qmp: "),
        (PEER + '[[egress]]\nname = "vm1"\nto = "xl:"\nqmp = "unix:/q"', "egress[0].qmp: xl: is guarded by itself"),
        (PEER + EGRESS + "require_guarded = 1", "egress[0].require_guarded: expected true or false, got 1"),
        (
            GOOD.replace("tcp:127.0.0.1:4440", "stdio:"),
            "ingress[0].from: expected tcp:HOST:PORT or unix:PATH, got 'stdio:'",
        ),
        (
            GOOD.replace("tcp:127.0.0.1:4440", "exec:date"),
            "ingress[0].from: expected tcp:HOST:PORT or unix:PATH, got 'exec:",
        ),
        (GOOD.replace("tcp:127.0.0.1:4440", "tcp:x"), "ingress[0].from: the endpoint's address 'x' is no HOST:PORT"),
        (GOOD.replace("tcp:127.0.0.1:4444", "stdio:"), "egress[0].to: a daemon has no standard streams to give"),
        (GOOD.replace("tcp:127.0.0.1:4444", "tcp::0"), "egress[0].to: 'tcp::0': nobody can be reached on port 0"),
        (GOOD.replace("tcp:127.0.0.1:4444", "nbd:x"), "egress[0].to: 'nbd:x' is no endpoint"),
        ('identity = "identity"\n' + GOOD, "identity: expected an absolute path, got 'identity'"),
        ('state = ""\n' + GOOD, "state: expected an absolute path, got ''"),
        (f'control = "/{"x" * 107}"\n' + GOOD, "control: the path of a unix socket has at most 107 bytes"),
        ('[listen]\naddress = "8010"\n' + GOOD, "listen.address: the address '8010' is no HOST:PORT"),
        ('[metrics]\naddress = "x"\n' + GOOD, "metrics.address: the address 'x' is no HOST:PORT"),
        ('[limits]\nrate_limit = "much"\n' + GOOD, f"limits.rate_limit: expected {RATE}, got 'much'"),
        ('[limits]\nsession_rate_limit = "0 B/s"\n' + GOOD, f"limits.session_rate_limit: expected {RATE}, got '0 B/s'"),
        # korora xl
        (XL.replace("/run/", ""), "xl.socket: expected an absolute path, got 'xl.sock'"),
        (XL.replace("xl.sock", "x" * 107), "xl.socket: the path of a unix socket has at most 107 bytes"),
        (XL.replace("xl.sock", "korora/control.sock"), "xl.socket: it is the control socket's path"),
        (XL + 'peers = ["host-c"]', "xl.peers[0]: 'host-c' is no [[peer]] of this file"),
        (XL.replace('address = "host-b:8010"\n', ""), "xl: there is no [[peer]] with an address that it could send to"),
        (XL.partition("[xl]")[1] + XL.partition("[xl]")[2], "xl: there is no [[peer]] with an address"),
        (XL + "sessions_max = 513", "xl.sessions_max: expected int ≥ 1 and ≤ 512, got 513"),
        (XL + "sessions_max = 0", "xl.sessions_max: expected int ≥ 1 and ≤ 512, got 0"),
        (XL + "any_address = 1", "xl.any_address: expected true or false, got 1"),
        (XL + 'rate_limit = "3"', f"xl.rate_limit: expected {RATE}, got '3'"),
        (XL + 'encode = "zstd"', 'xl.encode: expected one of "auto", "best", "opaque", "pages", got'),
        (XL + "socke = 1", "xl.socke: no such key; expected one of any_address, egress, encode, lanes, "),
        (XL + INGRESS.replace("vm1", "xl"), "ingress: the name 'xl' is that of [xl]"),
        (PEER + INGRESS + 'xl_flags = "-z"', "ingress[0].xl_flags: it '-z': unknown flags of xl"),
        # TOML
        ("workers\n", "no TOML: Expected '=' after a key"),
        ('identity = "\x01"\n', "no TOML: Illegal character"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse(text)
    assert str(raised.value).startswith(f"{WHERE}: {words}")
    assert remedy_of(raised.value)


def test_what_is_not_utf8() -> None:
    with pytest.raises(ConfigurationError, match=f"^{WHERE}: no TOML: "):
        config.parse(b'identity = "\xff"', WHERE)


def test_ports_that_are_chosen_are_not_one() -> None:
    text = PEER + INGRESS.replace("4440", "0") + INGRESS.replace("vm1", "vm2").replace("4440", "0")
    assert len(parse(text).ingress) == 2


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "korora.toml"
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        config.read(path)
    path.write_text(GOOD)
    assert config.read(path) == parse(GOOD)
    path.write_text("#" * (config.CONFIG_BYTES_MAX + 1))
    with pytest.raises(ConfigurationError, match=f"larger than {config.CONFIG_BYTES_MAX} bytes"):
        config.read(path)
    with pytest.raises(ConfigurationError, match="Is a directory"):
        config.read(tmp_path)


def named(check: Callable[[Any], object], given: Any) -> bool:
    """Whether it is right, or what is wrong is named; anything else is raised."""
    try:
        check(given)
    except ConfigurationError as error:
        return str(error).startswith(WHERE)
    return True


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_named(text: str) -> None:
    for whole in (text, GOOD + text, text + "\n" + GOOD):
        assert named(parse, whole)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2000)
    | st.text(max_size=9)
    | st.sampled_from(["tcp:127.0.0.1:1", "vm1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "from", "to", "peer", "lanes", "peers", "pins", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
_KEYS = ["peer", "ingress", "egress", "listen", "limits", "metrics", "workers", "identity", "x"]


@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=5))
def test_any_tree_is_a_configuration_or_named(tree: dict[str, object]) -> None:
    """Whatever shape it has, the key that is named leads to a type that can be described."""

    def bare(value: object) -> object:  # TOML has no null
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items() if inner is not None}
        if isinstance(value, list):
            return [bare(inner) for inner in value if inner is not None]
        return value

    whole = {key: bare(value) for key, value in tree.items() if value is not None}
    assert named(lambda raw: config.convert(raw, WHERE), whole)


@pytest.mark.parametrize(
    ("rate", "value"),
    [
        (None, None),
        (1024, 1024),
        ("1024 B/s", 1024),
        ("200 MiB/s", 200 * 2**20),
        ("200MiB/s", 200 * 2**20),
        ("1.5 GiB/s", 1.5 * 2**30),
        ("10 MB/s", 10**7),
        ("64 kB/s", 64_000),
        ("64 KiB/s", 65_536),
        ("10 Gbit/s", 1.25e9),
        ("2 TiB/s", 2 * 2**40),
    ],
)
def test_rates(rate: int | str | None, value: float | None) -> None:
    assert config.bytes_per_second(rate) == value


@pytest.mark.parametrize(
    "rate", [1023, "1", "1 GB", "GB/s", "-1 MB/s", "1e3 MB/s", "1 MB/s ", "1  MB/s", "1 mB/s", "١ MB/s"]
)
def test_no_rates(rate: int | str) -> None:
    with pytest.raises(ValueError, match="rate"):
        config.bytes_per_second(rate)
