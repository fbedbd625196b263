"""What a configuration says of pages is what sessions are agreed on by."""

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


def test_without_a_word_pages_are_encoded_as_it_pays_and_for_nobody() -> None:
    wanted = made()
    terms = build.destination_of(wanted, wanted.ingress[0]).paging
    assert (terms.encode, terms.tenant, terms.library) == (Encode.AUTO, "", None)
    assert (terms.cache_bytes, terms.chains) == (wanted.pages.cache_bytes, wanted.pages.chains)
    assert terms.wanted


def test_an_egress_says_whose_pages_arrive() -> None:
    wanted = made("[pages]\ncache_bytes = 4096\n")
    assert build.paging_of(wanted, "in").tenant == "blue"
    assert (build.paging_of(wanted).tenant, build.paging_of(wanted, "gone").tenant) == ("", "")
    assert build.paging_of(wanted, "in").cache_bytes == 4096


def test_no_cache_is_no_pages() -> None:
    wanted = made("[pages]\ncache_bytes = 0\n")
    assert not build.destination_of(wanted, wanted.ingress[0]).paging.wanted
    assert not build.paging_of(wanted).wanted
