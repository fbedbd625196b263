"""What a configuration says of pages is what sessions are agreed on by."""

from pathlib import Path

import pytest

from korora.daemon import build, config
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
