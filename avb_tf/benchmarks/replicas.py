"""Times two replicas on one machine: the same global batch on one device, two devices, two workers.

`make bench-replicas` runs this module. The first networks are dense and as wide as those of
configs/mnist.py. The second are the authors' networks, which have 27 million gradients to sum. Each
measurement runs in new processes for two reasons: TensorFlow fixes the number of threads per
operation when it starts, and on the CPU it confuses the collectives of two strategies in one
process.
"""

import itertools
import json
import multiprocessing
import os
import socket
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
import tensorflow as tf

from avb_tf import configuration, replicas
from avb_tf.benchmarks.step import seconds_of
from avb_tf.commands import train
from avb_tf.data import pipeline
from avb_tf.data.source import Split, array_split

EVENT = (28, 28, 1)
NETWORKS = {
    "avb_ac, 300 wide": configuration.default("avb_ac", width=300, bases=32, adversary_width=256),
    "the authors', dense": configuration.default("avb_ac_paper"),
}
BATCHES = (128, 1024)


def measure(
    config: ml_collections.ConfigDict, strategy_name: str, environment: Mapping[str, str]
) -> float:
    """Returns the median seconds of a step; call it in a process that has not used TensorFlow yet.

    Args:
      config: the run's config.
      strategy_name: name of the strategy, as in config.strategy.
      environment: environment variables to set.
    """
    os.environ.update(environment)
    if strategy_name == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
    strategy = replicas.strategy(strategy_name)  # before any other use of TensorFlow
    images = np.random.default_rng(0).random((4 * config.batch_size, *EVENT)) < 0.2
    split = array_split(images.astype(np.float32))
    with strategy.scope():
        model = train.create(config, EVENT)
    step, iterator = model.make_train_function(), iter(shared_batches(strategy, split, config))
    (seconds,) = seconds_of(lambda: step(iterator))
    return seconds


def shared_batches(
    strategy: tf.distribute.Strategy, split: Split, config: ml_collections.ConfigDict
) -> Any:
    """Batches of `config.batch_size` examples, of which each replica has its share."""
    size = config.batch_size
    return strategy.distribute_datasets_from_function(
        lambda context: pipeline.training_batches(split, size, 0, 0, context=context)
    )


def _in_processes(config, strategy_name, environments) -> float:
    """Runs `measure` in one process per environment; they wait for each other at each step."""
    context = multiprocessing.get_context("spawn")
    pools = [context.Pool(1) for _ in environments]
    try:
        jobs = [
            pool.apply_async(measure, (config, strategy_name, environment))
            for pool, environment in zip(pools, environments, strict=True)
        ]
        return max(job.get(timeout=600) for job in jobs)
    finally:
        for pool in pools:
            pool.terminate()


def _workers() -> list[dict[str, str]]:
    """Returns the environments of two workers with one thread per operation each."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in (first, second)]
    return [
        {
            "TF_NUM_INTRAOP_THREADS": "1",
            "TF_CONFIG": json.dumps(
                {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            ),
        }
        for index in range(2)
    ]


def main() -> None:
    """Prints the table of step times."""
    print("| networks | batch | one device, seconds of a step | two devices | two workers |")
    print("|---|---|---|---|---|")
    for (name, config), batch_size in itertools.product(NETWORKS.items(), BATCHES):
        config.batch_size = batch_size
        # Times each strategy with one thread per operation and with one per core; takes the faster.
        threads = [{"TF_NUM_INTRAOP_THREADS": n} for n in ("1", str(os.cpu_count()))]
        one, two = (
            min(_in_processes(config, strategy, [each]) for each in threads)
            for strategy in ("one", "mirrored")
        )
        workers = _in_processes(config, "multi_worker", _workers())
        row = [f"{one:.4f}", *(f"{t:.4f}, {t / one:.2f} times" for t in (two, workers))]
        print(f"| {name} | {batch_size} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
