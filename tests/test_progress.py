"""Tests the line that shows how far a run is."""

import io

import pytest

from avb_tf.callbacks import progress


class Model:
    class step:
        value = 0

        @classmethod
        def numpy(cls):
            return cls.value


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Returns the time that the callback sees, in seconds, as a list with one entry."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(stream, clock, calls=4, steps=50, first=60.0, each=1.0):
    callback = progress.Progress(1000, stream)
    callback.set_model(Model)
    Model.step.value = 0
    callback.on_train_begin()
    for call in range(calls):
        clock[0] += each if call else first
        Model.step.value += steps
        callback.on_train_batch_end(call, {"elbo": -10.0 - call, "adversary_accuracy": 0.5})
    callback.on_epoch_end(0, {"elbo": -12.5, "val_elbo": -13.25, "adversary_accuracy": 0.5})
    callback.on_train_end()


def test_a_file_gets_a_line_an_epoch(clock):
    stream = io.StringIO()
    run(stream, clock)
    expected = "compiling  step 0/1,000\n"
    expected += "elbo -12.50  val -13.25  adversary 0.50  step 200/1,000  0:00:16 left\n"
    assert stream.getvalue() == expected


def test_a_terminal_shows_one_line_without_the_time_of_compiling(clock):
    stream = Terminal()
    run(stream, clock)
    assert stream.getvalue().count("\n") == 1
    states = stream.getvalue().strip("\r\n").split("\r")
    assert states[0] == "compiling  step 0/1,000"
    assert "left" not in states[1]  # the first call took 60 s because of compilation
    assert states[2].rstrip().endswith("step 100/1,000  0:00:18 left")
    assert states[-1].startswith("elbo -12.50  val -13.25")


def test_a_shorter_line_leaves_nothing_of_a_longer_one(clock):
    stream = Terminal()
    run(stream, clock, calls=20)
    longest, *_, last = map(len, stream.getvalue().strip("\r\n").split("\r")[-2:])
    assert last == longest


def test_it_fits_80_columns():
    logs = {"elbo": -1234.56, "adversary_accuracy": 0.5}
    assert len(progress.line(logs, -1234.56, 999_999, 1_000_000, 43199.0)) <= 80


def test_a_first_epoch_without_metrics():
    assert progress.line({}, None, 0, 10, None) == "step 0/10"
