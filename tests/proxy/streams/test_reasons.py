"""Every code by which a parser gives a stream up is explained, and no other."""

import re
from pathlib import Path

CHECKOUT = Path(__file__).parents[3]


def test_docs_streams_md_explains_each_code() -> None:
    given = set()
    for source in (CHECKOUT / "proxy" / "streams").glob("*.py"):
        text = source.read_text()
        for words in re.findall(r'(?:Surprise\(|_give_up\(|opaque_reason = )("[^)\n]*)', text):
            given |= set(re.findall(r'"([a-z_]+)"', words))
    page = (CHECKOUT / "docs" / "streams.md").read_text()
    table = page[page.index("| code | what was met |") : page.index("## Limits")]
    explained = {code for row in table.strip().splitlines() for code in re.findall(r"`([a-z_]+)`", row.split("|")[1])}
    assert given == explained
