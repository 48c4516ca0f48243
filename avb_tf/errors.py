"""Exceptions of this package."""


class UserError(ValueError):
    """A mistake that the user can correct.

    Args:
      message: what was found, what was expected and what to do; line breaks become spaces.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class DivergenceError(ArithmeticError):
    """Training diverged; a rollback to a checkpoint may help."""


class WorkerLostError(ConnectionError):
    """Another worker of the job has stopped; the job must be restarted."""
