"""Atomic replacement of files."""

import os
from pathlib import Path


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replaces `file` by `content` atomically.

    Args:
      file: its folder must exist.
      content: text is encoded as UTF-8.
    Raises:
      OSError: the file cannot be written; the old content stays.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, file)
    except OSError as error:  # the message of a full disk does not name the file
        raise OSError(f"cannot write {file} ({error.strerror or error})") from error
    finally:
        # Processes that were killed while writing may have left such files, too.
        for left in file.parent.glob(f".{file.name}.*"):
            if left == temporary or not _runs(left.suffix[1:]):
                left.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether a process of this id is running on this machine."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True  # it belongs to another user
    except (ValueError, OSError, OverflowError):
        return False
    return True
