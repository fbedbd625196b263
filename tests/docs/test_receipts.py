"""docs/receipts.md has every member of a receipt as the structs have it, the files as the log has them, and the limits.

`.venv/bin/python -m tests.docs.test_receipts` writes the tables anew.
"""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
import pytest
from msgspec import inspect

from crypto.identity import Identity
from crypto.receipts import audit, bundle, limits, log, peers, signers, statement
from crypto.receipts.dsse import PAYLOAD_TYPE, countersign, encode, sign

PATH: Final = Path(__file__).parents[2] / "docs" / "receipts.md"
HEAD: Final = "| member | is | says |\n| --- | --- | --- |\n"
STRUCTS: Final = (
    statement.Statement,
    statement.Subject,
    statement.Predicate,
    statement.Party,
    statement.Machine,
    statement.Policies,
    statement.Decision,
    statement.Procedure,
    statement.Attestation,
    statement.Octets,
    statement.Heads,
)


def told(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What the docstring says of each member."""
    words: dict[str, str] = {}
    names: list[str] = []
    for line in str(struct.__doc__).partition("Args:\n")[2].splitlines():
        match = re.match(r"^ {4,8}(\w+(?:, \w+)*): (.+)$", line)
        if match is not None:
            names = match[1].split(", ")
            words.update(dict.fromkeys(names, match[2]))
        elif line.strip():
            words.update({name: f"{words[name]} {line.strip()}" for name in names})
    return words


def spelled(kind: inspect.Type) -> str:
    """A type in words."""
    match kind:
        case inspect.StrType(pattern=pattern) if pattern is not None:
            return f"string `{pattern.removesuffix(chr(92) + 'Z').removeprefix('^')}`".replace("|", "\\|")
        case inspect.StrType(min_length=low, max_length=high):
            return f"string of {low} to {high} characters" if low else f"string, at most {high} characters"
        case inspect.IntType(ge=low, le=high):
            return f"integer, {low} to 2^{(high or 0).bit_length()} - 1"
        case inspect.BoolType():
            return "`true` or `false`"
        case inspect.EnumType(cls=cls):
            return " or ".join(f"`{one.value}`" for one in cls)
        case inspect.LiteralType(values=values):
            return " or ".join(f'`"{one}"`' if one == "" else f"`{one}`" for one in declared(values))
        case inspect.StructType(cls=cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case inspect.VarTupleType(item_type=item, min_length=low, max_length=high):
            return f"array of {spelled(item)}; {low or 0} to {high}"
        case inspect.DictType(key_type=key, value_type=value, min_length=low, max_length=high):
            return f"object, {low or 0} to {high} members; keys: {spelled(key)}; values: {spelled(value)}"
        case inspect.UnionType(types=types):
            return ", or ".join(spelled(one) for one in types if not isinstance(one, inspect.NoneType)) + ", or `null`"
    raise AssertionError(kind)


def declared(values: tuple[object, ...]) -> list[object]:
    """In an order that does not change: msgspec sorts them as it likes."""
    return sorted(values, key=str)


def table(struct: type[msgspec.Struct]) -> str:
    """One struct's members."""
    says = told(struct)
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    names = [field.encode_name for field in info.fields]
    assert set(says) == set(names), struct
    return HEAD + "".join(
        f"| `{field.encode_name}` | {spelled(field.type)} | {says[field.encode_name].replace('``', '`')} |\n"
        for field in info.fields
    )


def parts() -> dict[str, str]:
    """What has to stand in the page, by its heading."""
    return {f"#### {struct.__name__}\n\n": table(struct) for struct in STRUCTS}


@pytest.mark.parametrize("heading", parts())
def test_every_member_is_there_as_it_is(heading: str) -> None:
    page = PATH.read_text(encoding="utf-8")
    assert heading in page
    assert page.partition(heading)[2].startswith(parts()[heading])


def test_files_and_types_are_called_so() -> None:
    page = PATH.read_text(encoding="utf-8")
    files = (log.ENTRIES, log.INDEX, log.HEAD, f"{signers.SIGNERS}/", f"{peers.PEERS}/")
    for name in files:
        assert re.search(rf"^    {re.escape(name)} ", page, re.MULTILINE), name
    assert f"`{log.FOLDER}/` of the state directory" in page
    for word in (statement.PREDICATE_TYPE, statement.STATEMENT_TYPE, PAYLOAD_TYPE, bundle.TYPE):
        assert f"`{word}`" in page
    for kind in audit.Kind.__args__:  # type: ignore[attr-defined]
        assert f"| {kind} |" in page, kind


def test_limits_are_as_they_are() -> None:
    page = PATH.read_text(encoding="utf-8")
    for words in (
        f"A statement has at most {limits.STATEMENT_BYTES_MAX // 1024} KiB, an envelope "
        f"{limits.RECEIPT_BYTES_MAX // 1024} KiB and {limits.SIGNATURES_MAX} signatures",
        f"{limits.HEADS_ASKED_MAX} heads at a time",
        f"{limits.EVIDENCE_FILES_MAX} files of evidence",
        f"{bundle.ENTRIES_MAX:,} receipts".replace(",", " "),
    ):
        assert words in " ".join(page.split()), words


def test_the_example_is_a_statement_of_ours() -> None:
    example = PATH.read_text(encoding="utf-8").partition("```json\n")[2].partition("```")[0]
    content = json.dumps(json.loads(example), separators=(",", ":"), ensure_ascii=False).encode()
    assert statement.parse(content).predicate.outcome == "done"


def test_the_program_for_other_tools_works(identity_alpha: Path, identity_beta: Path, tmp_path: Path) -> None:
    page = PATH.read_text(encoding="utf-8")
    (tmp_path / "verify.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    alpha, beta = (Identity.load(one, now=datetime.now(UTC)) for one in (identity_alpha, identity_beta))
    example = json.loads(page.partition("```json\n")[2].partition("```")[0])
    payload = json.dumps(example, separators=(",", ":")).encode()
    certificates = [identity_alpha / "signing.crt", identity_beta / "signing.crt"]
    for envelope, code in (
        (countersign(sign(payload, alpha.signing_key), beta.signing_key), 0),
        (sign(payload, alpha.signing_key), 1),
    ):
        (tmp_path / "receipt.json").write_bytes(encode(envelope))
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "verify.py", "receipt.json", *map(str, certificates)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (run.returncode, run.stdout) == (code, "done\n" if code == 0 else ""), run.stderr


if __name__ == "__main__":
    content = PATH.read_text(encoding="utf-8")
    for heading, made in parts().items():
        before, found, after = content.partition(heading)
        if not found:
            sys.exit(f"{PATH}: there is no {heading.strip()!r}")
        rest = after[after.index("\n\n") + 1 :] if after.startswith("|") else f"\n{after}"
        content = before + found + made + rest
    PATH.write_text(content, encoding="utf-8")
