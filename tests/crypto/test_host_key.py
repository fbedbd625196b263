"""The host key is made once, is nobody else's, and is never replaced by itself."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crypto.errors import IdentityMalformed, IdentityMissing, IdentityPermissions
from crypto.host_key import host_key


def test_it_is_made_on_first_use_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "state" / "store.key"
    key = host_key(path)
    assert (len(key), stat.S_IMODE(path.stat().st_mode)) == (32, 0o600)
    assert host_key(path) == key
    assert [entry.name for entry in path.parent.iterdir()] == ["store.key"]
    assert host_key(tmp_path / "other" / "store.key") != key


def test_of_many_at_once_all_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(host_key, [tmp_path / "store.key"] * 64))
    assert len(keys) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["store.key"]


@pytest.mark.parametrize("content", [b"", b"k" * 31, b"k" * 33])
def test_what_is_no_key_is_refused_and_left(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "store.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityMalformed):
        host_key(path)
    assert path.read_bytes() == content


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.key"
    host_key(path)
    path.chmod(0o640)
    with pytest.raises(IdentityPermissions, match="0640") as refused:
        host_key(path)
    assert str(path) in refused.value.remedy


def test_where_no_key_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityMissing):
        host_key(tmp_path / "file" / "store.key")
    (tmp_path / "folder").mkdir()
    with pytest.raises((IdentityMissing, IdentityMalformed)):
        host_key(tmp_path / "folder")
