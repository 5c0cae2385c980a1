"""The mark of a complete checkpoint when the mark itself, or the disk, is damaged: always a reason, never an exception."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_longvila.checkpoint import complete


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "common.pt").write_bytes(bytes(100))
    (tmp_path / "__0_0.distcp").write_bytes(bytes(complete._HASHED_BYTES + 1))
    complete.mark_complete(tmp_path)
    assert complete.find_damage(tmp_path) is None
    return tmp_path


def _lists_the_same(one: bytes, other: bytes) -> bool:
    """Whether a changed mark still lists the same files: the version and white space do not matter."""
    try:
        return json.loads(one)["files"] == json.loads(other)["files"]
    except (ValueError, KeyError):
        return False


def test_any_flipped_bit_of_the_mark(folder: Path) -> None:
    mark = folder / "complete.json"
    good = mark.read_bytes()
    for place in range(len(good)):
        for bit in (0, 7):
            mark.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
            damage = complete.find_damage(folder)
            assert (damage is None) == _lists_the_same(good, mark.read_bytes()), (place, bit, damage)


@pytest.mark.parametrize("content", ["[]", "null", '{"files": []}', '{"files": {"common.pt": 100}}', '{"files": {"common.pt": {}}}'])
def test_a_mark_of_another_form(folder: Path, content: str) -> None:
    (folder / "complete.json").write_text(content)
    assert "complete.json cannot be read" in complete.find_damage(folder)


def test_a_file_that_the_disk_does_not_give(folder: Path, monkeypatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(complete, "_digest", fail)
    assert complete.find_damage(folder) == f"{folder}/common.pt cannot be read ([Errno 5] Input/output error: '{folder}/common.pt')"
