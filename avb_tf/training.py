"""config -> data, model, fit."""

import math
from pathlib import Path

import keras
import ml_collections

from avb_tf import assembly, callbacks, checkpoints, configuration, data, monitoring
from avb_tf.data import pipeline
from avb_tf.model import AVB
from avb_tf.optimizers import Adam
from avb_tf.schedules import DelayedCosine

FIGURE_EXAMPLES = 500  # held-out examples in the figures and in the validation curves


def train(config: ml_collections.ConfigDict, workdir: Path) -> AVB:
    """Trains a run to its end, from its newest checkpoint if it has one.

    Raises:
      UserError: bad data, parts that do not fit, or a workdir that holds another run.
    """
    source = data.load(config.data)
    model = create(config, source.event_shape)
    configuration.save(config, workdir)
    if checkpoints.restore(model, workdir):
        print(f"{workdir}: at step {int(model.step.value)} of {config.steps}")
    step = int(model.step.value)
    if step >= config.steps:
        return model

    epoch = min(config.log_every, config.steps)
    batches = pipeline.training_batches(
        source.train, config.batch_size, config.model.seed, step, config.steps
    )
    validation = pipeline.evaluation_batches(
        source.validation, config.batch_size, model.likelihood.binary
    )
    held_out = pipeline.examples(source.validation, FIGURE_EXAMPLES, model.likelihood.binary)
    labels = source.validation.labels
    model.fit(
        batches,
        epochs=math.ceil(config.steps / epoch),
        initial_epoch=step // epoch,
        steps_per_epoch=epoch,
        shuffle=False,  # the batches are shuffled already
        validation_data=validation.take(math.ceil(FIGURE_EXAMPLES / config.batch_size)),
        callbacks=[
            # First: what it adds to the logs is for the others.
            monitoring.Monitor(
                held_out[: config.monitor.examples],
                config.monitor.samples,
                config.monitor.largest_gap,
                workdir / "logs" / "validation",
            ),
            callbacks.StopOnNonFinite(),
            callbacks.StopAtStep(config.steps),
            callbacks.Checkpoints(workdir, config.checkpoint_every, config.keep_checkpoints),
            callbacks.Scalars(workdir / "logs"),
            callbacks.Figures(
                workdir,
                config.figures_every,
                held_out,
                None if labels is None else labels[: len(held_out)],
            ),
        ],
    )
    print(f"{workdir}: trained to step {int(model.step.value)}")
    return model


def create(config: ml_collections.ConfigDict, event_shape: tuple[int, ...]) -> AVB:
    """The compiled model of a config.

    Raises:
      UserError: a name that does not exist, or parts that do not fit each other.
    """
    keras.utils.set_random_seed(config.model.seed)  # of the initial weights
    model = assembly.build(config.method, event_shape, **config.model)
    o = config.optimizer
    decays = o.decay == "cosine"
    rate = DelayedCosine(
        o.learning_rate, config.steps, o.final if decays else 1.0, o.adversary_warmup
    )
    # The adversary's optimizer counts its own, more frequent steps.
    adversary_rate = DelayedCosine(
        o.adversary_learning_rate,
        config.steps * config.model.adversary_steps,
        o.adversary_final if decays else 1.0,
    )
    clip = o.clip_norm or None
    model.compile(
        Adam(rate, o.beta_1, global_clipnorm=clip),
        Adam(adversary_rate, o.beta_1, global_clipnorm=clip),
        steps_per_execution=_steps_per_execution(config),
    )
    return model


def _steps_per_execution(config) -> int:
    """As many steps in one call of the graph as fit all that happens between steps."""
    period = math.gcd(config.steps, min(config.log_every, config.steps))
    return max(n for n in range(1, 101) if period % n == 0)
