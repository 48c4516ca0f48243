"""Runs a short training in a separate process: on one device, on two, or as one of the workers.

  python -m tests.replicated OUT STRATEGY STEPS_PER_EXECUTION METHOD STEPS

It writes the final weights, optimizers and metrics to OUT, an .npz file. It also writes how many
examples an evaluation of all held-out data has counted; the last batch of these is smaller than the
others.
"""

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

from avb_tf import data, replicas
from avb_tf.commands import train
from avb_tf.data import pipeline
from configs import digits

BATCH = 32


def config(variant):
    """Returns a config with everything on which replicas could disagree.

    It has dual steps, averages, clipping and, if the network is convolutional, batch normalisation.
    `variant` is a method, or a method and a network as in `avb_ac_paper:conv`.
    """
    method, _, network = variant.partition(":")
    config = digits.get_config(method)
    config.model.update(width=16, bases=4, basis_width=8, adversary_width=16, products=8)
    config.model.update(network=network or "dense", filters=(3, 4), strides=(2, 2))
    config.model.update(adversary_steps=2, ema_decay=0.9)
    config.optimizer.clip_norm = 5.0  # the gradient norm is about 20 at first
    config.batch_size = BATCH
    return config


def main(out, name, steps_per_execution, method, steps):
    if name == "mirrored":
        gpus = tf.config.list_physical_devices("GPU")
        memory = {"memory_limit": 4096} if gpus else {}
        tf.config.set_logical_device_configuration(
            (gpus or tf.config.list_physical_devices("CPU"))[0],
            [tf.config.LogicalDeviceConfiguration(**memory)] * 2,
        )
    strategy = replicas.strategy(name)
    settings = config(method)
    settings.steps = int(steps)
    source = data.load(settings.data)
    with strategy.scope():
        model = train.create(settings, source.event_shape)
    model.steps_per_execution = int(steps_per_execution)
    history = model.fit(
        source.train,
        batch_size=BATCH,
        steps_per_epoch=settings.steps,
        validation_data=pipeline.evaluation_batches(source.validation, BATCH, True).take(4),
        verbose=0,
    ).history
    optimizers = [o for o in (model.optimizer, model.adversary_optimizer) if o]
    variables = model.weights + [v for o in optimizers for v in o.variables]
    state = {f"{i:03d} {v.path}": keras.ops.convert_to_numpy(v) for i, v in enumerate(variables)}
    metrics = {f"metric {k}": v[-1] for k, v in history.items()}
    model.evaluate(pipeline.evaluation_batches(source.validation, BATCH, True), verbose=0)
    count = keras.ops.convert_to_numpy(model.means["elbo"].count)
    state["count"] = np.array([count, source.validation.size])
    np.savez(out, **state, **metrics)


if __name__ == "__main__":
    main(*sys.argv[1:])
