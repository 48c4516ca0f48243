"""SIGTERM, which most schedulers send a while before they stop a program."""

import contextlib
import signal
from collections.abc import Generator

STATUS = 128 + signal.SIGTERM  # exit status that a shell reports after SIGTERM
_arrived = False


@contextlib.contextmanager
def listening() -> Generator[None]:
    """Notes SIGTERM inside the block, for `asked`, and restores the previous handler on exit."""
    global _arrived

    def note(*_):
        global _arrived
        _arrived = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _arrived = False


def asked() -> bool:
    """Returns whether SIGTERM has arrived inside `listening`."""
    return _arrived
