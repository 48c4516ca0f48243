"""The benchmark of replicas: what is timed is a share of the whole batch."""

import ml_collections
import numpy as np
import pytest
import tensorflow as tf

from avb_tf.benchmarks import replicas
from avb_tf.data import pipeline
from avb_tf.data.source import array_split


class Replicas:
    """The part of a strategy that makes batches, for the first of `workers`."""

    def __init__(self, workers, count):
        self.context = tf.distribute.InputContext(workers, 0, count)

    def distribute_datasets_from_function(self, function):
        return function(self.context)


@pytest.mark.parametrize(("workers", "count"), [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_each_replica_has_its_share_of_the_batch(workers, count):
    split = array_split(np.arange(20, dtype=np.float32)[:, np.newaxis])
    config = ml_collections.ConfigDict({"batch_size": 8})
    shares = iter(replicas.shared_batches(Replicas(workers, count), split, config))
    whole = next(iter(pipeline.training_batches(split, 8, 0, 0)))
    own = [next(shares) for _ in range(count // workers)]
    np.testing.assert_array_equal(np.concatenate(own), whole[: 8 // workers])
