"""What a configuration says of pages is what sessions are agreed on by."""

from pathlib import Path

import pytest

from korora.daemon import build, config
from proxy.errors import ConfigurationError, PolicyRefused, RelayError
from proxy.paging import Encode

TEXT = """
{pages}
[[peer]]
name = "beta"
address = "beta:8010"
[[ingress]]
name = "out"
from = "tcp:127.0.0.1:4440"
peer = "beta"
{ingress}
[[egress]]
name = "in"
to = "tcp:127.0.0.1:4444"
tenant = "blue"
"""


def made(pages: str = "", ingress: str = "") -> config.Config:
    return config.parse(TEXT.format(pages=pages, ingress=ingress).encode(), "test")


@pytest.mark.parametrize("encode", Encode)
def test_an_ingress_says_how_its_sessions_are_encoded(encode: Encode) -> None:
    wanted = made("[pages]\ncache_bytes = 8192\nchains = 3\n", f'encode = "{encode}"\ntenant = "red"')
    terms = build.destination_of(wanted, wanted.ingress[0]).paging
    assert (terms.encode, terms.cache_bytes, terms.chains, terms.tenant) == (encode, 8192, 3, "red")
    assert terms.wanted == (encode is not Encode.OPAQUE)
    assert terms.chains_offered == (1 if encode is Encode.BEST else 3)


def test_without_a_word_pages_are_encoded_as_it_pays_and_for_one_tenant() -> None:
    wanted = made()
    terms = build.destination_of(wanted, wanted.ingress[0]).paging
    assert (terms.encode, terms.tenant, terms.store) == (Encode.AUTO, "default", None)
    assert (terms.cache_bytes, terms.chains) == (wanted.pages.cache_bytes, wanted.pages.chains)
    assert terms.wanted


def test_an_egress_says_whose_pages_arrive() -> None:
    wanted = made("[pages]\ncache_bytes = 4096\n")
    assert build.tenants(wanted) == {"in": "blue"}
    assert (build.paging_of(wanted).tenant, build.paging_of(wanted).cache_bytes) == ("", 4096)


def test_a_monitor_makes_the_hand_over_qemu_s() -> None:
    plain = made()
    where = build.destination_of(plain, plain.ingress[0])
    assert (where.handover, where.guarded) == ("xl", False)
    assert (build.monitor_of(plain.ingress[0]), build.monitors(plain), build.guarded(plain)) == ("", {}, frozenset())
    wanted = made("", 'qmp = "unix:/run/vm1"\nrequire_guarded = true')
    where = build.destination_of(wanted, wanted.ingress[0])
    assert (where.handover, where.guarded) == ("qmp", True)
    assert build.monitor_of(wanted.ingress[0]) == "/run/vm1"
    text = TEXT + 'qmp = "unix:/run/vm2"\nrequire_guarded = true\n'
    arriving = config.parse(text.format(pages="", ingress="").encode(), "test")
    assert (build.monitors(arriving), build.guarded(arriving)) == ({"in": "/run/vm2"}, frozenset({"in"}))


def test_a_daemon_has_a_store_in_its_state_folder_unless_it_is_turned_off(tmp_path: Path) -> None:
    state = f'state = "{tmp_path}/state"\n'
    host_store = build.open_host_store(config.parse((state + TEXT.format(pages="", ingress="")).encode(), "test"))
    assert host_store is not None
    host_store.close()
    assert (tmp_path / "state" / "store").is_dir()
    off = TEXT.format(pages="[pages]\nstore_bytes = 0\n", ingress="")
    assert build.open_host_store(config.parse((state + off).encode(), "test")) is None


def test_no_cache_is_no_pages() -> None:
    wanted = made("[pages]\ncache_bytes = 0\n")
    assert not build.destination_of(wanted, wanted.ingress[0]).paging.wanted
    assert not build.paging_of(wanted).wanted


# ------------------------------------------------------------------ korora xl

XL = """
[xl]
socket = "/run/xl.sock"
egress = "vm"
lanes = 3
rate_limit = 5000
encode = "best"
tenant = "red"
{more}
[[peer]]
name = "beta"
address = "beta.example:8010"
[[peer]]
name = "gamma"
address = "[2001:db8::7]:9000"
[[peer]]
name = "delta"
"""


def xl(more: str = "") -> config.Config:
    return config.parse(XL.format(more=more).encode(), "test")


def test_what_xl_says_goes_for_its_sessions() -> None:
    client, where = build.xl_destination(xl(), "beta", (), "ep")
    assert (client, where.host, where.port, where.egress, where.lanes) == ("beta", "beta.example", 8010, "vm", 3)
    assert (where.xl_flags, where.rate_limit, where.resume_seconds) == ("ep", 5000, 30)
    assert (where.paging.encode, where.paging.tenant) == (Encode.BEST, "red")


ANY = "any_address = true"


@pytest.mark.parametrize(
    ("more", "peer", "names", "found"),
    [
        ("", "beta", ("beta", "gamma"), ("beta", "beta.example:8010")),
        ("", "beta.example", (), ("beta", "beta.example:8010")),
        ("", "beta.example:8010", (), ("beta", "beta.example:8010")),
        ("", "[2001:db8::7]:9000", (), ("gamma", "[2001:db8::7]:9000")),
        ('peers = ["gamma"]', "gamma", (), ("gamma", "[2001:db8::7]:9000")),
        (ANY, "delta", (), ("delta", "delta:8010")),
        (ANY, "beta", (), ("beta", "beta.example:8010")),
        (ANY, "192.0.2.1:77", (), (build.ANY_PEER, "192.0.2.1:77")),
        (ANY, "192.0.2.1", ("gamma",), ("gamma", "192.0.2.1:8010")),
    ],
)
def test_whom_korora_xl_finds(more: str, peer: str, names: tuple[str, ...], found: tuple[str, str]) -> None:
    client, where = build.xl_destination(xl(more), peer, names, "")
    assert (client, where.address) == found


@pytest.mark.parametrize(
    ("more", "peer", "names", "kind", "words"),
    [
        ("", "delta", (), PolicyRefused, "knows no address of 'delta'"),
        ("", "192.0.2.1", (), PolicyRefused, "192.0.2.1 is no host that the daemon sends to: beta, delta, gamma"),
        ("", "beta.example:8011", (), PolicyRefused, "is no host"),
        ('peers = ["gamma"]', "beta", (), PolicyRefused, "beta is no host that the daemon sends to: gamma"),
        ('peers = ["gamma"]', "beta.example", (), PolicyRefused, "is no host"),
        ("", "beta", ("gamma",), PolicyRefused, "beta is no host that the daemon sends to: gamma"),
        ("", "beta", ("omega",), PolicyRefused, "of the hosts named by --name, the daemon sends to none: omega"),
        (ANY, "192.0.2.1", ("beta", "gamma"), ConfigurationError, "of several --name none can be meant"),
        (ANY, "a:b:c", (), ConfigurationError, "PEER 'a:b:c' is no HOST:PORT"),
        (ANY, "", (), ConfigurationError, "PEER '' names no host"),
    ],
)
def test_whom_it_does_not(more: str, peer: str, names: tuple[str, ...], kind: type[RelayError], words: str) -> None:
    with pytest.raises(kind, match=words.replace("[", "\\[")):
        build.xl_destination(xl(more), peer, names, "")


def test_an_ingress_of_xl() -> None:
    wanted = made(ingress='xl_flags = "-p -e"')
    where = build.destination_of(wanted, wanted.ingress[0])
    assert (where.xl_flags, where.one_channel) == ("pe", True)
    plain = made()
    assert not build.destination_of(plain, plain.ingress[0]).one_channel
