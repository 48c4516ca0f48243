"""Files replaced whole or not at all."""

import os
from pathlib import Path


def write_atomically(file: Path, content: str | bytes) -> None:
    """Replaces what `file` holds by `content`, whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, file)
    except OSError as error:  # of a full disk it does not say where
        raise OSError(f"cannot write {file} ({error.strerror or error})") from error
    finally:
        # There may be others, of processes that were killed while they wrote.
        for left in file.parent.glob(f".{file.name}.*"):
            if left == temporary or not _runs(left.suffix[1:]):
                left.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether this machine runs a process of that id."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True  # somebody else's
    except (ValueError, OSError, OverflowError):
        return False
    return True
