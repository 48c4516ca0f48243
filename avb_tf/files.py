"""Files that survive a crash: durable replacement, locks and checksums."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Generator
from pathlib import Path

from absl import logging

from avb_tf.errors import UserError

TRAINING, EVALUATION = ".train.lock", ".evaluate.lock"  # what a process locks in its workdir
CHECKSUMS = "checksums.json"  # SHA-256 of the other files of a directory, by relative path
COMMITTED = ".new"  # subdirectory with the files of a finished `saving` that are still to be moved
# Errors of a file system that has no locks, or no fsync on directories.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replaces the content of `file`, atomically and durably.

    Args:
      file: the file; its folder must exist.
      content: the new content; text is encoded as UTF-8.
    Raises:
      OSError: the file cannot be written; the old content stays.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        remove_leftovers(file)
        with open(temporary, "xb") as new:  # "x" never follows a link
            new.write(content.encode() if isinstance(content, str) else content)
        replace(temporary, file)
    except OSError as error:  # the system's message about a full disk does not name the file
        raise OSError(f"cannot write {file} ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def replace(temporary: Path, final: Path) -> None:
    """Renames `temporary` to `final`, so that a power loss leaves the old or the complete new one.

    The content reaches the disk before the rename, and the rename before this function returns.

    Args:
      temporary: a file or a directory, in the same folder as `final`.
      final: the new path. An existing file is replaced; a directory must not exist yet.
    Raises:
      OSError: the disk is full or not writable, or `final` is a directory that exists.
    """
    sync_all(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def sync_all(path: Path) -> None:
    """Calls `sync` for a file, or for a directory and everything below it."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    if not path.is_dir():
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a directory, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _UNSUPPORTED):
            raise
    finally:
        os.close(handle)


def make_directory(directory: Path, inside: Path | None = None) -> None:
    """Creates a directory and its missing parents durably, unless it exists.

    Args:
      directory: to create.
      inside: a parent that must exist, such as the workdir of a run. A workdir that has vanished
        must not be created again, because it would lack its config and checkpoints.
    Raises:
      OSError: `inside` does not exist, or the directory cannot be created.
    """
    if inside is not None and not inside.is_dir():
        raise FileNotFoundError(f"{inside} is gone")
    missing = list(
        itertools.takewhile(lambda path: not path.exists(), (directory, *directory.parents))
    )
    directory.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def remove_leftovers(path: Path) -> None:
    """Removes the files `.<name>.<process>` that killed processes left while they wrote `path`."""
    for left in path.parent.glob(f".{path.name}.*"):
        process = left.name.removeprefix(f".{path.name}.")
        if process == str(os.getpid()) or not _runs(process):
            _remove(left)


def _remove(path: Path) -> None:
    """Removes a file, a link, or a directory with all that is in it; it may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Returns whether a process with this id is running on this machine."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True  # it belongs to another user
    except (ValueError, OSError, OverflowError):
        return False
    return True


@contextlib.contextmanager
def locked(file: Path) -> Generator[None]:
    """Holds an exclusive lock on `file` inside the block.

    The lock ends with the process, even after SIGKILL. The file stays.

    Args:
      file: the lock file, created if missing; its folder must exist.
    Raises:
      UserError: another process holds the lock.
      OSError: the file cannot be written.
    """
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise OSError(f"cannot write {file} ({error.strerror})") from error
    with open(handle, "r+", errors="replace") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = " ".join(held.read(100).split()) or "another command"
            raise UserError(
                f"{file.parent} is in use by {holder}; expected one command at a time; wait for "
                "its end, or stop it"
            ) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            logging.warning("%s cannot be locked (%s); start one command at a time", file, error)
        held.truncate(0)
        held.write(f"process {os.getpid()} on {platform.node()}\n")
        held.flush()
        yield


@contextlib.contextmanager
def saving(directory: Path, record: str, content: str, *names: str) -> Generator[Path]:
    """Replaces files of a directory together: a kill leaves all old ones or all new ones.

        with files.saving(path, "fit.json", json.dumps(meta), "fit.weights.h5") as new:
            model.save_weights(new / "fit.weights.h5")

    The block writes into a subdirectory, which is renamed once it is complete. `settle` then moves
    its files into place, also after a kill in between.

    Args:
      directory: created if missing; its other files are kept.
      record: name of the file that marks the directory as complete.
      content: content of the record.
      *names: names of the files and folders that the block writes.
    Yields:
      The directory into which the block writes `names`.
    Raises:
      UserError: the directory cannot be written.
    """
    partial = directory / f".partial.{os.getpid()}"
    try:
        make_directory(directory)
        remove_leftovers(directory / "partial")
        settle(directory)
        partial.mkdir()
        yield partial
        (partial / record).write_text(content)
        write_checksums(partial, *names, record)
        replace(partial, directory / COMMITTED)
        settle(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error}; choose another path") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_saved(directory: Path, record: str) -> bool:
    """Returns whether a `saving` of `directory` with this record has finished."""
    settle(directory)
    return (directory / record).exists()


def settle(directory: Path) -> None:
    """Moves the files of a finished `saving` into place if a kill has prevented that.

    Raises:
      OSError: the directory cannot be written.
    """
    new = directory / COMMITTED
    if not new.is_dir():
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)  # another process may do the same
        if new.is_symlink() or not new.is_dir():
            return
        for path in sorted(new.iterdir()):
            _remove(directory / path.name)
            os.replace(path, directory / path.name)
        sync(directory)
        sync(new)
        new.rmdir()
        sync(directory)
    finally:
        os.close(handle)


@contextlib.contextmanager
def loading(directory: Path, writer: str) -> Generator[None]:
    """Verifies the checksums of a directory that `saving` wrote, then runs the block that loads it.

    Args:
      directory: the directory.
      writer: name of the function that writes such directories, for the message.
    Raises:
      UserError: a file is missing or damaged, or the block cannot use it.
    """
    try:
        settle(directory)
        verify(directory)
        yield
    except Exception as error:  # JSON, Keras and TensorFlow raise many types on a damaged file
        raise UserError(
            f"{directory} cannot be loaded ({error!s:.200}); expected a directory that {writer} "
            "wrote"
        ) from error


def write_checksums(directory: Path, *names: str) -> None:
    """Writes `CHECKSUMS`, for `verify`.

    Args:
      directory: the directory of the files, where `CHECKSUMS` is written.
      *names: files and folders in it; the SHA-256 of each file, also in the folders, is recorded.
    """
    sums = {}
    for name in names:
        path = directory / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                sums[file.relative_to(directory).as_posix()] = _checksum(file)
    write_atomically(directory / CHECKSUMS, json.dumps(sums, indent=2) + "\n")


def verify(directory: Path) -> None:
    """Compares the files in `directory` with its checksums.

    A directory without checksums is accepted, because earlier versions wrote none.

    Raises:
      UserError: a file is missing or was changed since `write_checksums`.
      OSError: a file cannot be read.
    """
    record = directory / CHECKSUMS
    if not record.exists():
        return
    try:
        expected = dict(json.loads(record.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{record} is damaged; restore {directory}, or write it anew") from error
    for name, checksum in expected.items():
        file = directory / name
        if not file.is_file() or _checksum(file) != checksum:
            state = "was changed or damaged since it was written" if file.exists() else "is missing"
            raise UserError(
                f"{file} {state}; expected the checksum of {record.name}; restore {directory}, or "
                "write it anew"
            )


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
