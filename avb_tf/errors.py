"""The exceptions with a meaning of their own."""


class UserError(ValueError):
    """A mistake that the user can mend: what was found, what was expected, what to do."""

    def __init__(self, message: str):
        """Makes one line of `message`, whatever it quotes."""
        super().__init__(" ".join(message.splitlines()))


class DivergenceError(ArithmeticError):
    """Training has left the numbers; going back to a checkpoint may help."""


class WorkerLostError(ConnectionError):
    """Another worker of the job is gone; the job has to be started again."""
