"""Stored limits are found again; other files in the folder count as missing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from chatstream.tuning.cache import MAX_AGE_S, MAX_FILES, LimitCache, this_machine

KEY = {"model": "a", "itl_target_s": 0.1, "context_len": None, "cores": 2}


def test_a_written_limit_is_read(tmp_path: Path) -> None:
    LimitCache(tmp_path / "new" / "folder").write(KEY, 12)
    assert LimitCache(tmp_path / "new" / "folder").read(KEY) == 12
    assert LimitCache(tmp_path / "new" / "folder").read(dict(reversed(KEY.items()))) == 12


@pytest.mark.parametrize("change", [{"model": "b"}, {"itl_target_s": 0.2}, {"context_len": 1}, {"more": 1}])
def test_another_key_has_no_limit(change: dict[str, str | float], tmp_path: Path) -> None:
    LimitCache(tmp_path).write(KEY, 12)
    assert LimitCache(tmp_path).read(KEY | change) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[" * 100_000,
        b"12",
        b"{}",
        b'{"max_concurrency": 12}',
        b'{"key": {"model": "a"}, "max_concurrency": 12}',
        json.dumps({"key": KEY, "max_concurrency": 0}).encode(),
        json.dumps({"key": KEY, "max_concurrency": "12"}).encode(),
        json.dumps({"key": KEY, "max_concurrency": 1.5}).encode(),
        json.dumps({"key": KEY}).encode(),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(text: bytes, tmp_path: Path) -> None:
    cache = LimitCache(tmp_path)
    cache.write(KEY, 12)
    [file] = tmp_path.iterdir()
    file.write_bytes(text)
    assert cache.read(KEY) is None
    cache.write(KEY, 13)
    assert cache.read(KEY) == 13


def test_an_old_file_is_ignored(tmp_path: Path) -> None:
    LimitCache(tmp_path).write(KEY, 12)
    [file] = tmp_path.iterdir()
    os.utime(file, (time.time() - MAX_AGE_S - 60,) * 2)
    assert LimitCache(tmp_path).read(KEY) is None


def test_an_unwritable_folder_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = LimitCache(tmp_path / "file" / "folder")
    cache.write(KEY, 12)
    assert cache.read(KEY) is None


def test_a_failed_write_keeps_the_stored_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LimitCache(tmp_path / "kept")
    cache.write(KEY, 12)

    def fails(self: Path, text: str, encoding: str) -> None:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fails)
    cache.write(KEY, 13)
    monkeypatch.undo()
    assert cache.read(KEY) == 12
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_the_oldest_files_are_deleted(tmp_path: Path) -> None:
    cache = LimitCache(tmp_path)
    cache.write(KEY, 12)
    [oldest] = tmp_path.iterdir()
    os.utime(oldest, (time.time() - 60,) * 2)
    for number in range(MAX_FILES):
        cache.write({"number": number}, 1)
    assert len(list(tmp_path.iterdir())) == MAX_FILES
    assert cache.read(KEY) is None
    assert cache.read({"number": 0}) == 1


def test_the_default_is_the_user_s_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    LimitCache().write(KEY, 12)
    assert len(list((tmp_path / "chatstream" / "max-concurrency").iterdir())) == 1


def test_the_key_of_a_machine_is_stable_and_serialisable() -> None:
    machine = this_machine()
    assert machine == this_machine()
    assert isinstance(machine["cores"], int)
    assert machine["cores"] >= 1
    json.dumps(machine)
