"""Tests that an interrupted estimate continues with the same results."""

from typing import NamedTuple

import keras
import numpy as np
import pytest

from avb_tf import build
from avb_tf.likelihood_estimation import chunks


class Record(NamedTuple):
    squares: np.ndarray  # [2, examples]
    index: np.ndarray  # [examples]


X = np.arange(11.0)


class Compute:
    """Computes squares, records its calls, and may fail at one of them."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def __call__(self, index, part):
        if index == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append(index)
        return Record(np.stack([X[part] ** 2, X[part]]), np.full(len(X[part]), index))


def run(compute, directory):
    return chunks.run(Record, compute, len(X), directory, "chunk", size=4)


def test_chunks_cover_the_examples(tmp_path):
    values, seconds = run(Compute(), tmp_path)
    np.testing.assert_array_equal(values.squares, [X**2, X])
    np.testing.assert_array_equal(values.index, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    assert seconds >= 0.0


def test_an_interrupted_run_continues_from_the_chunks_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Compute(fails_at=1), tmp_path)
    again = Compute()
    values, _ = run(again, tmp_path)
    assert again.calls == [1, 2]
    np.testing.assert_array_equal(values.squares, [X**2, X])
    idle = Compute()
    run(idle, tmp_path)
    assert idle.calls == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("damage", ["truncated", "nonsense", "another shape", "pickle", "empty"])
def test_a_damaged_chunk_is_computed_anew(tmp_path, damage):
    run(Compute(), tmp_path)
    file = tmp_path / "chunk_001.npz"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "nonsense":
        file.write_bytes(b"nonsense")
    elif damage == "another shape":
        np.savez(file, squares=np.zeros((2, 3)), index=np.zeros(3), seconds=np.zeros(1))
    elif damage == "pickle":
        np.savez(file, squares=np.array([object()]), index=np.zeros(4), seconds=np.zeros(1))
    else:
        file.write_bytes(b"")
    again = Compute()
    values, _ = run(again, tmp_path)
    assert again.calls == [1]
    np.testing.assert_array_equal(values.squares, [X**2, X])


def test_the_fingerprint_tells_models_examples_and_settings_apart():
    def model(seed):
        keras.utils.set_random_seed(seed)
        return build("vae", (3,), latent_dim=2, width=4)

    one, x = model(0), np.zeros((2, 3), np.float32)
    names = [
        chunks.fingerprint(one, x, {"a": 1}),
        chunks.fingerprint(model(1), x, {"a": 1}),
        chunks.fingerprint(one, x + 1, {"a": 1}),
        chunks.fingerprint(one, x, {"a": 2}),
    ]
    assert len(set(names)) == 4
    assert chunks.fingerprint(one, x, {"a": 1}) == names[0]
