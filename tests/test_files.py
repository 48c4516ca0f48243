"""Tests replaced files, locks and checksums."""

import errno
import os
import re
import signal
import subprocess
import sys

import pytest

from avb_tf import files
from avb_tf.errors import UserError


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, fails):
    file = tmp_path / "a.json"
    files.write_atomically(file, "old")

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(OSError, match=rf"cannot write {re.escape(str(file))} \(No space"):
        files.write_atomically(file, "new")
    assert contents(tmp_path) == {"a.json": "old"}
    monkeypatch.undo()
    files.write_atomically(file, "new")
    assert contents(tmp_path) == {"a.json": "new"}


def test_the_temporary_file_of_a_running_process_is_not_deleted(tmp_path):
    for process in (os.getppid(), 2**22 + 1):  # the second does not exist
        (tmp_path / f".a.json.{process}").write_text("half")
    files.write_atomically(tmp_path / "a.json", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".a.json.{os.getppid()}", "a.json",
    ]  # fmt: skip


def test_no_link_is_followed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for name in ("a.json", f".a.json.{os.getpid()}", ".lock"):
        (tmp_path / name).symlink_to(kept)
    files.write_atomically(tmp_path / "a.json", "new")
    with (
        pytest.raises(OSError, match=r"cannot write .*\.lock"),
        files.locked(tmp_path / ".lock"),
    ):
        pass
    assert contents(tmp_path) == {"kept": "kept", "a.json": "new", ".lock": "kept"}


def test_a_directory_is_replaced_whole(tmp_path):
    (tmp_path / "partial/sub").mkdir(parents=True)
    (tmp_path / "partial/sub/a").write_text("new")
    files.replace(tmp_path / "partial", tmp_path / "final")
    assert (tmp_path / "final/sub/a").read_text() == "new"
    (tmp_path / "partial").mkdir()
    with pytest.raises(OSError, match="not empty"):
        files.replace(tmp_path / "partial", tmp_path / "final")


def test_all_missing_parents_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", synced.append)
    files.make_directory(tmp_path / "a/b")
    assert set(synced) == {tmp_path, tmp_path / "a"}
    files.make_directory(tmp_path / "a/b")
    assert len(synced) == 2


HOLD = """
import pathlib, sys, time
from avb_tf import files
with files.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_refused_to_others_and_ends_with_its_process(tmp_path):
    lock = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"{tmp_path} is in use by process {holder.pid} on"),
            files.locked(lock),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with (
        files.locked(lock),
        pytest.raises(UserError, match=f"process {os.getpid()} on"),
        files.locked(lock),
    ):
        pass
    with files.locked(lock):
        pass


def test_changed_and_missing_files_are_noticed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b", "other"):
        (tmp_path / name).write_text(name)
    files.verify(tmp_path)  # accepts a directory of an earlier version, without checksums
    files.write_checksums(tmp_path, "a", "sub")
    (tmp_path / "other").write_text("changed")
    files.verify(tmp_path)
    (tmp_path / "sub/b").write_text("sub/c")
    with pytest.raises(UserError, match="sub/b was changed or damaged"):
        files.verify(tmp_path)
    (tmp_path / "sub/b").unlink()
    with pytest.raises(UserError, match="sub/b is missing"):
        files.verify(tmp_path)
    (tmp_path / files.CHECKSUMS).write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        files.verify(tmp_path)


def test_a_directory_that_is_half_written_has_no_record(tmp_path):
    folder = tmp_path / "fit"

    def save(fails):
        with files.saving(folder, "fit.json", "{}", "a"):
            (folder / "a").write_text("half")
            if fails:
                raise OSError("full")

    save(fails=False)
    files.verify(folder)
    assert set(contents(folder)) == {"a", "fit.json", files.CHECKSUMS}
    with pytest.raises(UserError, match="full; choose another path"):
        save(fails=True)
    assert set(contents(folder)) == {"a"}
