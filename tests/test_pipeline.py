"""Tests the stateless pipeline: batches depend on the step only, binarisation on the seed."""

import numpy as np
import pytest
import tensorflow as tf

from avb_tf.data import pipeline
from avb_tf.data.source import array_split

GREY = array_split(np.linspace(0.0, 1.0, 7 * 5, dtype=np.float32).reshape(7, 5))


def visits(size, batch_size, steps, seed=0):
    """Returns the indices of the examples in `steps` batches, [steps * batch_size]."""
    split = array_split(np.arange(size)[:, np.newaxis] / size)
    batches = pipeline.training_batches(split, batch_size, seed, 0, steps)
    x = np.concatenate(list(batches.as_numpy_iterator()))
    return np.rint(x[:, 0] * size).astype(int)


def stream(first_step, last_step, seed=3):
    batches = pipeline.training_batches(GREY, 4, seed, first_step, last_step)
    return np.stack(list(batches.as_numpy_iterator()))


def test_a_stream_resumed_at_a_step_replays_the_uninterrupted_one():
    np.testing.assert_array_equal(stream(6, 15), stream(0, 15)[6:])


@pytest.mark.parametrize(
    ("size", "batch_size"), [(4, 256), (7, 3), (12, 4), (1, 5), (1000, 64)], ids=str
)
def test_each_epoch_visits_each_example_once(size, batch_size):
    steps = -(-3 * size // batch_size)
    epochs = visits(size, batch_size, steps)[: 3 * size].reshape(3, size)
    np.testing.assert_array_equal(np.sort(epochs), [np.arange(size)] * 3)


def test_orders_differ_between_epochs_and_seeds_without_correlation():
    size = 40_000
    first, second = visits(size, size, 2).reshape(2, size)
    orders = [np.arange(size), first, second, visits(size, size, 1, seed=1)]
    correlations = np.corrcoef(orders)[np.triu_indices(4, k=1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(size)


def test_batches_differ_between_steps_and_seeds():
    split = array_split(np.arange(1000)[:, np.newaxis] / 1000)
    batches = [pipeline.training_batches(split, 4, seed, 0, 10) for seed in (3, 4)]
    rows = np.concatenate([list(b.as_numpy_iterator()) for b in batches])
    assert len(np.unique(rows.reshape(20, -1), axis=0)) == 20


def test_binarisation_has_the_mean_of_the_intensity():
    intensity = np.array([0.0, 0.02, 0.3, 0.5, 0.9, 1.0])
    size = 5000
    split = array_split(np.tile(intensity, (size, 1)))
    batches = pipeline.evaluation_batches(split, 100, binary=True)
    x = np.concatenate(list(batches.as_numpy_iterator()))
    assert set(np.unique(x)) == {0.0, 1.0}
    standard_error = np.sqrt(intensity * (1 - intensity) / size)
    assert (np.abs(x.mean(0) - intensity) <= 5 * standard_error).all()


def test_tf_data_does_not_tune_the_stream():
    for batches in (
        pipeline.training_batches(GREY, 4, 0, 0, 2), pipeline.evaluation_batches(GREY, 4, False)
    ):  # fmt: skip
        assert batches.options().autotune.enabled is False


def test_evaluation_is_in_order_with_a_smaller_last_batch():
    batches = list(pipeline.evaluation_batches(GREY, 3, binary=False).as_numpy_iterator())
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), GREY.read(tf.range(7)))


def test_evaluation_binarisation_depends_on_seed_and_example_only():
    split = array_split(np.full((9, 64), 0.5))

    def evaluated(batch_size, seed=0):
        batches = pipeline.evaluation_batches(split, batch_size, binary=True, seed=seed)
        return np.concatenate(list(batches.as_numpy_iterator()))

    np.testing.assert_array_equal(evaluated(2), evaluated(9))
    assert len(np.unique(np.concatenate([evaluated(9), evaluated(9, seed=1)]), axis=0)) == 18


@pytest.mark.parametrize("binary", [False, True])
def test_shapes_are_static(binary):
    training = pipeline.training_batches(GREY, 4, 0, 0, 1)
    assert training.element_spec == tf.TensorSpec([4, 5], tf.float32)
    evaluation = pipeline.evaluation_batches(GREY, 4, binary)
    assert evaluation.element_spec == tf.TensorSpec([None, 5], tf.float32)


@pytest.mark.parametrize(("count", "expected"), [(5, 5), (100, 7)])
def test_examples_are_the_first_of_evaluation(count, expected):
    x = pipeline.examples(GREY, count, binary=True, seed=2)
    batches = pipeline.evaluation_batches(GREY, 2, binary=True, seed=2)
    np.testing.assert_array_equal(x, np.concatenate(list(batches))[:expected])


@pytest.mark.parametrize(("workers", "replicas"), [(1, 2), (2, 2), (3, 6)])
def test_replicas_share_each_batch_in_order(workers, replicas):
    def batches(worker=0, workers=1, replicas=1):
        context = tf.distribute.InputContext(workers, worker, replicas)
        shares = pipeline.training_batches(GREY, 12, 0, 3, 10, context=context)
        return np.stack([x.numpy() for x in shares])

    whole = batches()
    assert len(whole) == 7
    shares = [batches(worker, workers, replicas) for worker in range(workers)]
    assert shares[0].shape[1] == 12 // replicas
    joined = np.concatenate([s.reshape(7, 12 // workers, *whole.shape[2:]) for s in shares], 1)
    np.testing.assert_array_equal(joined, whole)
