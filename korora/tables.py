"""TOML in, checked structs out, for whatever the operator writes: every error names file, key and what was expected."""

import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from proxy.errors import ConfigurationError

T = TypeVar("T", bound=Struct)


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table of a file: keys it does not know are errors.

    What errors say of a key's type is its ``Meta(description=...)``, where it has one.
    """


def load(content: bytes, where: str, example: str) -> dict[str, Any]:
    """What TOML holds.

    Args:
        content: UTF-8.
        where: what errors call it.
        example: the page that has one.

    Raises:
        ConfigurationError: it is no TOML.
    """
    try:
        return tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{where}: no TOML: {error}", f"{example} has an example") from None
    except RecursionError:  # tomllib's parser calls itself for each bracket
        raise ConfigurationError(f"{where}: no TOML: brackets too deep", f"{example} has an example") from None


def convert(raw: dict[str, Any], root: type[T], where: str) -> T:
    """Check what TOML held.

    Raises:
        ConfigurationError: a key is unknown, missing, or of another type; the message names `where` and the key.
    """
    try:
        return msgspec.convert(raw, root, strict=True)
    except msgspec.ValidationError as error:
        raise _explained(where, str(error), raw, root) from None


# ---------------------------------------------------------------- msgspec's errors in the words of the file

_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_KEY: Final = re.compile(r"`(?P<key>[^`]*)`")


def _explained(where: str, message: str, raw: dict[str, Any], root: type[Struct]) -> ConfigurationError:
    match = _AT.match(message)
    what, path = (match["what"], match["path"] or "") if match is not None else (message, "")
    steps: list[str | int] = [int(step[1:-1]) if step[0] == "[" else step for step in re.findall(r"\[\d+\]|\w+", path)]
    key = _KEY.search(what)
    if key is not None and "unknown field" in what:
        name = f"{path}.{key['key']}" if path else key["key"]
        known = ", ".join(sorted(_keys(_type_at(root, steps))))
        return ConfigurationError(f"{where}: {name}: no such key; expected one of {known}", "correct the key")
    if key is not None and "missing required field" in what:
        steps.append(key["key"])
        name = f"{path}.{key['key']}" if path else key["key"]
        return ConfigurationError(
            f"{where}: {name}: missing; expected {_expected(_type_at(root, steps))}", "add the key"
        )
    got = _value_at(raw, steps)
    return ConfigurationError(
        f"{where}: {path or 'the file'}: expected {_expected(_type_at(root, steps))}, got {shown(got)}",
        "correct the value",
    )


def _value_at(raw: Any, steps: Sequence[str | int]) -> Any:
    for step in steps:
        raw = raw[step]
    return raw


def _type_at(root: type[Struct], steps: Sequence[str | int]) -> msgspec.inspect.Type:
    kind = msgspec.inspect.type_info(root)
    for step in steps:
        kind = next(inner for each in _alternatives(kind) for inner in _within(each, step))
    return kind


def _alternatives(kind: msgspec.inspect.Type) -> Iterator[msgspec.inspect.Type]:
    """A type without what is said about it; each part of a union."""
    match kind:
        case msgspec.inspect.Metadata():
            yield from _alternatives(kind.type)
        case msgspec.inspect.UnionType():
            for part in kind.types:
                yield from _alternatives(part)
        case _:
            yield kind


def _within(kind: msgspec.inspect.Type, step: str | int) -> Iterator[msgspec.inspect.Type]:
    match kind:
        case msgspec.inspect.StructType():
            yield from (field.type for field in kind.fields if field.encode_name == step)
        case msgspec.inspect.VarTupleType():
            yield kind.item_type
        case _:
            return


def _keys(kind: msgspec.inspect.Type) -> Iterator[str]:
    if isinstance(kind, msgspec.inspect.StructType):
        for field in kind.fields:
            yield field.encode_name


def _expected(kind: msgspec.inspect.Type) -> str:
    inspect = msgspec.inspect
    match kind:
        case inspect.Metadata(extra_json_schema={"description": str(words)}):
            return words
        case inspect.UnionType():
            return next(_expected(part) for part in kind.types if not isinstance(part, inspect.NoneType))
        case inspect.IntType(ge=low, le=high):
            bounds = [f"{sign} {bound}" for sign, bound in (("≥", low), ("≤", high)) if bound is not None]
            return "int" + (" " + " and ".join(bounds) if bounds else "")
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(f'"{value}"' for value in values)
        case inspect.StrType():
            return "a string"
        case inspect.DateTimeType():
            return "a date and time"
        case inspect.VarTupleType(item_type=inspect.StructType(), max_length=most):
            return "tables in double brackets" + (f", at most {most}" if most is not None else "")
        case inspect.VarTupleType():
            return "a list"
        case _:
            return "a table"


def shown(value: Any) -> str:
    """A value of the file as an error shows it."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
