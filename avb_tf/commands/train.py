"""config -> data, model, fit."""

import contextlib
import math
from pathlib import Path

import keras
import ml_collections
import tensorflow as tf
from absl import logging

from avb_tf import assembly, checkpoints, configuration, data, replicas
from avb_tf.callbacks import guard, monitor, tensorboard, writing
from avb_tf.data import pipeline
from avb_tf.errors import DivergenceError, UserError
from avb_tf.model import AVB
from avb_tf.optimizers import Adam
from avb_tf.schedules import DelayedCosine

FIGURE_EXAMPLES = 500  # held-out examples in the figures and in the validation curves
CALL_SECONDS = 1.0  # that one call of the training graph may take
FIRST_STEPS = 10  # in a call of a compiled loop, until the seconds of a step are known


def train(config: ml_collections.ConfigDict, workdir: Path) -> AVB:
    """Trains a run to its end, from its newest checkpoint if it has one.

    Where loss or gradient is no number for too long, training goes back to the newest checkpoint
    and on from there with lower learning rates, as often as config.guard allows.

    Raises:
      UserError: bad data, parts that do not fit, a workdir that holds another run, or training
        that has left the numbers for good.
      WorkerLostError: of several workers, another one is gone.
    """
    if checkpoints.newest_step(workdir) >= config.steps:
        strategy = tf.distribute.get_strategy()  # nobody to wait for: the others may have left
    else:
        strategy = replicas.strategy(config.strategy)
    replicas.check_batch_size(config.batch_size, strategy)
    tf.config.experimental.enable_tensor_float_32_execution(config.tf32)
    with replicas.explained(strategy), writing.logged():
        return _train(config, workdir, strategy)


def _train(config, workdir, strategy) -> AVB:
    chief = replicas.is_chief()
    assembly.checked(config.method, **config.model)  # before data that may take long to load
    source = data.load(config.data)
    with strategy.scope():
        model = create(config, source.event_shape)
    if chief:
        configuration.save(config, workdir)
    if _restore(model, strategy, workdir):
        print(f"{workdir}: at step {int(model.step.numpy())} of {config.steps}")
    if int(model.step.numpy()) >= config.steps:
        return model
    if chief and int(model.step.numpy()) == 0:  # to go back to
        checkpoints.save(model, workdir, config.keep_checkpoints)

    run = Run(config, workdir, strategy, model, source)
    with run.terminated.listening():
        while int(model.step.numpy()) < config.steps:
            try:
                run.to_the_end()
            except DivergenceError as error:
                _roll_back(config, workdir, strategy, model, error)
    print(f"{workdir}: trained to step {int(model.step.numpy())}")
    return model


def _restore(model, strategy, workdir) -> bool:
    """Gives the model its newest checkpoint's state, if there is one.

    The chief alone looks for it, since damaged ones are set aside on the way.
    """
    newest = checkpoints.latest(workdir) if replicas.is_chief() else None
    step = -1 if newest is None else checkpoints.step_of(newest)
    step = replicas.sum_over_workers(strategy, 1 + step if replicas.is_chief() else 0) - 1
    if step >= 0:
        checkpoints.restore(model, checkpoints.path_of(workdir, step))
    return step >= 0


def _roll_back(config, workdir, strategy, model, error: DivergenceError) -> None:
    """Back to the newest checkpoint, which from now on has lower learning rates.

    Raises:
      UserError: no more of this is allowed.
    """
    guard, count = config.guard, int(model.rollbacks.numpy())
    if not guard.enabled or count >= guard.rollbacks:
        raise UserError(
            f"training diverged: {error}, after {count} returns to a checkpoint with lower "
            "learning rates; expected numbers; lower config.optimizer.learning_rate, in another "
            "--workdir; the last good checkpoint is kept"
        ) from error
    _restore(model, strategy, workdir)
    model.rollbacks.assign(count + 1)
    if replicas.is_chief():
        checkpoints.save(model, workdir, config.keep_checkpoints)
    logging.warning(
        "%s; back to step %d, learning rates now %g times those of the config",
        error, int(model.step.numpy()), guard.factor ** (count + 1),
    )  # fmt: skip


class Run:
    """The parts of a run that outlive a return to a checkpoint."""

    def __init__(self, config, workdir, strategy, model, source):
        self.config, self.strategy, self.model, self.source = config, strategy, model, source
        self.epoch = min(config.log_every, config.steps)
        chief = replicas.is_chief()
        binary, last = model.likelihood.binary, config.steps
        self.validation = pipeline.evaluation_batches(
            source.validation, config.batch_size, binary
        ).take(math.ceil(FIGURE_EXAMPLES / config.batch_size))
        writer = writing.Checkpoints(
            workdir, config.checkpoint_every, config.keep_checkpoints, last
        )
        self.terminated = guard.SaveWhenTerminated(writer.save if chief else lambda: None, strategy)
        self.callbacks = [guard.Guard(config.guard.enabled), guard.StopAtStep(last)]
        self.verbose = "auto" if chief else 0
        if chief:
            held_out = pipeline.examples(source.validation, FIGURE_EXAMPLES, binary)
            labels = source.validation.labels
            labels = None if labels is None else labels[: len(held_out)]
            self.callbacks = [
                # First: what it adds to the logs is for the others.
                monitor.Monitor(
                    held_out[: config.monitor.examples],
                    config.monitor.samples,
                    config.monitor.largest_gap,
                    workdir / "logs" / "validation",
                ),
                *self.callbacks,
                writing.Scalars(workdir / "logs"),
                writing.Figures(workdir, config.figures_every, last, held_out, labels),
                tensorboard.Panels(config, workdir, held_out, labels),
                tensorboard.Profile(workdir / "logs", config.profile_steps),
                writer,  # after the others: a run resumed at a step does not do its logs again
            ]
        self.callbacks += [self.terminated]

    def to_the_end(self):
        """Trains from the model's step on.

        First to the end of an epoch with few steps in a call of the graph; then with as many as
        take no longer than `CALL_SECONDS`, for a signal waits for the end of a call.
        """
        stopwatch = guard.Stopwatch()
        left = self.epoch - self._step % self.epoch
        # On a GPU a call costs as much as many steps.
        first = math.gcd(left, FIRST_STEPS) if self.model.loop_is_compiled else 1
        self._fit(first, left, self._step // self.epoch + 1, stopwatch)
        if self._step < self.config.steps:
            workers = replicas.sum_over_workers(self.strategy, 1)
            microseconds = int(1e6 * stopwatch.seconds / first)
            seconds = replicas.sum_over_workers(self.strategy, microseconds) / workers / 1e6
            count = _steps_per_execution(self.config, seconds)
            self._fit(count, self.epoch, math.ceil(self.config.steps / self.epoch))

    @property
    def _step(self) -> int:
        return int(self.model.step.numpy())

    def _fit(self, steps_per_execution, steps_per_epoch, epochs, *more):
        self.model.steps_per_execution = steps_per_execution
        self.model.fit(
            self.source.train,
            batch_size=self.config.batch_size,
            epochs=epochs,
            initial_epoch=self._step // self.epoch,
            steps_per_epoch=steps_per_epoch,
            validation_data=self.validation,
            callbacks=[*self.callbacks, *more],
            verbose=self.verbose,
        )


def create(config: ml_collections.ConfigDict, event_shape: tuple[int, ...]) -> AVB:
    """The compiled model of a config.

    Raises:
      UserError: a name that does not exist, or parts that do not fit each other.
    """
    keras.utils.set_random_seed(config.model.seed)  # of the initial weights
    with _computing_in(config.precision):
        model = assembly.build(config.method, event_shape, **config.model)
    model.skip_non_finite, model.patience = config.guard.enabled, config.guard.patience
    model.resident_megabytes = config.resident_megabytes
    o = config.optimizer
    decays = o.decay == "cosine"
    lowered = {"factor": config.guard.factor, "rollbacks": model.rollbacks}
    rate = DelayedCosine(
        o.learning_rate,
        config.steps,
        o.final if decays else 1.0,
        o.adversary_warmup,
        **lowered,
    )
    # The adversary's optimizer counts its own, more frequent steps.
    adversary_rate = DelayedCosine(
        o.adversary_learning_rate,
        config.steps * config.model.adversary_steps,
        o.adversary_final if decays else 1.0,
        **lowered,
    )
    clip = o.clip_norm or None
    model.compile(
        Adam(rate, o.beta_1, global_clipnorm=clip),
        Adam(adversary_rate, o.beta_1, global_clipnorm=clip),
    )
    return model


@contextlib.contextmanager
def _computing_in(policy: str):
    """Layers made here have the dtype policy `policy`."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _steps_per_execution(config, seconds_per_step: float) -> int:
    """As many steps in one call of the graph as fit all that happens between steps."""
    period = math.gcd(config.steps, min(config.log_every, config.steps))
    most = min(100, CALL_SECONDS / seconds_per_step)
    return max(n for n in range(1, 101) if period % n == 0 and n <= max(1, most))
