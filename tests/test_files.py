"""Atomic replacement of files."""

import errno
import os
import re
from pathlib import Path

import pytest

from avb_tf import files


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    files.write_atomically(file, "old")

    def full_disk(self, content):
        with self.open("wb") as stream:
            stream.write(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match=rf"cannot write {re.escape(str(file))} \(No space"):
        files.write_atomically(file, "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}
    monkeypatch.undo()
    files.write_atomically(file, "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "new"}


def test_the_temporary_file_of_a_running_process_is_not_deleted(tmp_path):
    for process in (os.getppid(), 2**22 + 1):  # the second does not exist
        (tmp_path / f".a.json.{process}").write_text("half")
    files.write_atomically(tmp_path / "a.json", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".a.json.{os.getppid()}", "a.json",
    ]  # fmt: skip
