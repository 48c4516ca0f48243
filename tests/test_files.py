"""Files replaced whole or not at all."""

import errno
import os
import re
from pathlib import Path

import pytest

from avb_tf import files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
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


def test_what_a_live_process_writes_is_left_to_it(tmp_path):
    for process in (os.getppid(), 2**22 + 1):  # the second is none
        (tmp_path / f".a.json.{process}").write_text("half")
    files.write_atomically(tmp_path / "a.json", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".a.json.{os.getppid()}", "a.json",
    ]  # fmt: skip
