"""What two replicas cost on one machine: the same whole batch on one device and on two.

Run by `make bench-replicas`. Both use all cores. The networks are those of configs/mnist.py, then
the authors', whose gradients of 27 million weights have to be summed.
"""

import ml_collections
import numpy as np
import tensorflow as tf

from avb_tf import benchmark, configuration, replicas, training
from avb_tf.data import pipeline
from avb_tf.data.source import array_split

EVENT = (28, 28, 1)


def measure(config: ml_collections.ConfigDict) -> list[float]:
    """Median seconds of a step on one device and on two logical ones, taken in turn."""
    images = np.random.default_rng(0).random((4 * config.batch_size, *EVENT)) < 0.2
    split = array_split(images.astype(np.float32))
    functions = []
    for name in ("one", "mirrored"):
        strategy = replicas.strategy(name)
        with strategy.scope():
            model = training.create(config, EVENT)
        batches = strategy.distribute_datasets_from_function(
            lambda context: pipeline.training_batches(
                split, config.batch_size, 0, 0, 2**31, context
            )
        )
        step, iterator = model.make_train_function(), iter(batches)
        functions.append(lambda step=step, iterator=iterator: step(iterator))
    return benchmark.seconds_of(*functions)


def main() -> None:
    """Prints a table."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    networks = {
        "configs/mnist.py:avb_ac": configuration.default(
            "avb_ac", width=300, bases=32, adversary_width=256
        ),
        "the authors', dense": configuration.default(
            "avb_ac_paper", width=300, adversary_width=1024, adversary_depth=3, products=8192,
            adversary_draws=1,
        ),
    }  # fmt: skip
    print("| networks | seconds of a step on one device | on two | ratio |")
    print("|---|---|---|---|")
    for name, config in networks.items():
        one, two = measure(config)
        print(f"| {name} | {one:.4f} | {two:.4f} | {two / one:.2f} |")


if __name__ == "__main__":
    main()
