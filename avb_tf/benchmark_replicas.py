"""What two replicas cost on one machine: the same whole batch on one device and on two.

Run by `make bench-replicas`. The networks are those of configs/mnist.py, then the authors', whose
gradients of 27 million weights have to be summed. Every figure is from a process of its own: how
many threads an operation has is settled when TensorFlow starts, and on the CPU the collectives of
two strategies in one process are taken for each other.
"""

import itertools
import multiprocessing
import os

import ml_collections
import numpy as np
import tensorflow as tf

from avb_tf import benchmark, configuration, replicas, training
from avb_tf.data import pipeline
from avb_tf.data.source import array_split

EVENT = (28, 28, 1)
NETWORKS = {
    "configs/mnist.py:avb_ac": configuration.default(
        "avb_ac", width=300, bases=32, adversary_width=256
    ),
    "the authors', dense": configuration.default(
        "avb_ac_paper", width=300, adversary_width=1024, adversary_depth=3, products=8192,
        adversary_draws=1,
    ),
}  # fmt: skip


def measure(config: ml_collections.ConfigDict, strategy_name: str) -> float:
    """Median seconds of a step, in a process that has not used TensorFlow yet."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    images = np.random.default_rng(0).random((4 * config.batch_size, *EVENT)) < 0.2
    split = array_split(images.astype(np.float32))
    strategy = replicas.strategy(strategy_name)
    with strategy.scope():
        model = training.create(config, EVENT)
    batches = strategy.distribute_datasets_from_function(
        lambda context: pipeline.training_batches(split, config.batch_size, 0, 0, 2**31, context)
    )
    step, iterator = model.make_train_function(), iter(batches)
    (seconds,) = benchmark.seconds_of(lambda: step(iterator))
    return seconds


def main() -> None:
    """Prints a table."""
    print("| networks | threads of an operation | one device, seconds of a step | two | ratio |")
    print("|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for (name, config), threads in itertools.product(NETWORKS.items(), (os.cpu_count(), 1)):
        os.environ["TF_NUM_INTRAOP_THREADS"] = str(threads)
        found = []
        for strategy in ("one", "mirrored"):
            with context.Pool(1) as pool:
                found.append(pool.apply(measure, (config, strategy)))
        one, two = found
        print(f"| {name} | {threads} | {one:.4f} | {two:.4f} | {two / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
