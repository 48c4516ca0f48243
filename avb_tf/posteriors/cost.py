"""What an evaluation of a log density takes, and how many draws it should get at once."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

ROWS = 8, 2**15  # fewest and most draws in an evaluation
_TRIALS = 64, 256  # draws of the evaluations that measure the cost of one
_SECONDS = 0.25  # that an evaluation of many draws should take at most
_CHEAP = 0.005  # seconds of an evaluation of 256 draws, below which any number may be evaluated


class Cost(NamedTuple):
    """Seconds that an evaluation takes: those of the call, and those of each draw.

    Cost(0.01, 1e-4).of(100)  # 0.02 seconds
    """

    call: float
    each: float

    def of(self, draws: int) -> float:
        """Returns the seconds of an evaluation of a number of draws."""
        return self.call + self.each * draws

    @property
    def rows(self) -> int:
        """Most draws that should be evaluated at once, an even number.

        A density with a matrix of a hundred rows for each draw needs ten gigabytes for 30,000
        draws, and one of a million rows of data as much for 256 draws. What takes no longer than a
        quarter of a second fits into any memory. A cheap density gets the same number on a busy
        machine, so that its fit is determined by its seed.
        """
        if self.of(_TRIALS[1]) < _CHEAP:
            return ROWS[1]
        halves = _SECONDS / (2.0 * max(self.each, 1e-9))
        return 2 * round(np.clip(halves, ROWS[0] / 2, ROWS[1] / 2))


def measured(function: Callable[[tf.Tensor], Any], dim: int, dtype: tf.DType) -> Cost:
    """Returns what a function of u [n, dim] takes, from evaluations of 64 and of 256 draws.

    If 64 draws take long, 8 and 64 are evaluated.
    """

    def seconds(count):
        return seconds_of(function, tf.zeros([count, dim], dtype))

    few, many = _TRIALS
    of_few = seconds(few)
    if of_few < _SECONDS:
        of_many = seconds(many)
    else:
        few, many, of_few, of_many = ROWS[0], few, seconds(ROWS[0]), of_few
    each = max(0.0, of_many - of_few) / (many - few)
    return Cost(max(0.0, of_many - each * many), each)


def seconds_of(function: Callable[[Any], Any], x: Any) -> float:
    """Returns the seconds that an evaluation takes on a quiet machine.

    The first evaluation traces the graph; the fastest of three others counts.
    """
    times = []
    for _ in range(4):
        began = time.monotonic()
        tf.nest.map_structure(np.asarray, function(x))
        times.append(time.monotonic() - began)
    return min(times[1:])
