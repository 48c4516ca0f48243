"""Trains a run: loads the data, makes the model, calls `fit`."""

import contextlib
import math
import os
from pathlib import Path

import keras
import ml_collections
import tensorflow as tf
from absl import logging

from avb_tf import assembly, checkpoints, configuration, data, files, replicas
from avb_tf.callbacks import guard, monitor, progress, tensorboard, writing
from avb_tf.data import pipeline
from avb_tf.data.table import Table
from avb_tf.errors import DivergenceError, UserError
from avb_tf.likelihoods import LIKELIHOODS
from avb_tf.model import AVB
from avb_tf.training import termination
from avb_tf.training.optimizers import Adam
from avb_tf.training.schedules import DelayedCosine

FIRST = "first_elbo.json"  # beside the checkpoints, for the guard of a resumed run
FIGURE_EXAMPLES = 500  # held-out examples in figures and validation curves
CALL_SECONDS = 1.0  # longest call of the training graph
SMALL_DATA = 128  # a batch up to this size may repeat examples, each time with other noise
FIRST_STEPS = 10  # steps in one call of a compiled loop until a step has been timed


def train(config: ml_collections.ConfigDict, workdir: Path) -> AVB:
    """Trains a run to its last step, from its newest checkpoint if it has one.

    If training diverges, it returns to a checkpoint and continues with lower learning rates, at
    most config.guard.rollbacks times.

    Raises:
      UserError: the data cannot be used, the parts of the model do not fit each other, the
        workdir holds another run or is in use, or training keeps diverging.
      WorkerLostError: another worker has stopped.
    """
    if checkpoints.newest_step(workdir) >= config.steps:
        strategy = tf.distribute.get_strategy()  # the other workers may have exited already
    else:
        strategy = replicas.strategy(config.strategy, config.worker_timeout)
    replicas.check_batch_size(config.batch_size, strategy)
    tf.config.experimental.enable_tensor_float_32_execution(config.tf32)
    with replicas.explained(strategy), writing.logged():
        return _train(config, workdir, strategy)


def _train(config, workdir, strategy) -> AVB:
    chief = replicas.is_chief()
    assembly.checked(config.method, **config.model)  # first, because loading may take long
    source = data.load(config.data, LIKELIHOODS.get(config.model.likelihood))
    _check_batch_size(config, source)
    with strategy.scope():
        model = create(config, source.event_shape, source.table)
    if not chief:
        return _resumed(config, workdir, strategy, model, source)
    configuration.save(config, workdir)
    with files.locked(workdir / files.TRAINING):
        return _resumed(config, workdir, strategy, model, source)


def _resumed(config, workdir, strategy, model, source) -> AVB:
    """Trains from the newest checkpoint, if there is one, to the last step."""
    if _restore(model, strategy, workdir):
        print(f"{workdir}: at step {int(model.step.numpy())} of {config.steps}")
    if int(model.step.numpy()) >= config.steps:
        return model
    if replicas.is_chief() and int(model.step.numpy()) == 0:
        # A rollback before the first regular checkpoint returns to this one.
        checkpoints.save(model, workdir, config.keep_checkpoints)

    training = Training(config, workdir, strategy, model, source)
    with termination.listening():
        while int(model.step.numpy()) < config.steps:
            try:
                training.to_the_end()
            except DivergenceError as error:
                _roll_back(config, workdir, strategy, model, error)
            except tf.errors.ResourceExhaustedError as error:
                raise UserError(
                    f"the device's memory cannot hold a step of config.batch_size = "
                    f"{config.batch_size} ({error.message:.80}); lower it"
                ) from error
    print(f"{workdir}: trained to step {int(model.step.numpy())}")
    return model


def _check_batch_size(config, source: data.Source) -> None:
    """Refuses a batch that is larger than the training data or than the memory can hold.

    The check counts x and, for each of `draws` draws of z, the decoder's output with its gradient.
    A step needs more memory than that.
    """
    size = config.batch_size
    if size > (most := max(source.train.size, SMALL_DATA)):
        raise UserError(
            f"config.batch_size is {size}, and there are {source.train.size} examples to train on; "
            f"expected at most {most}"
        )
    per_example = 4 * math.prod(source.event_shape) * (1 + 2 * config.model.draws)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (needed := size * per_example) > memory:
        raise UserError(
            f"config.batch_size is {size}; a step needs more than {needed / 2**30:.0f} GiB, and "
            f"the machine has {memory / 2**30:.0f}; expected at most {memory // per_example}"
        )


def _restore(model, strategy, workdir) -> bool:
    """Restores the newest checkpoint; returns whether there is one.

    Only the chief looks for it, because the search renames damaged checkpoints.
    """
    newest = checkpoints.latest(workdir) if replicas.is_chief() else None
    step = -1 if newest is None else checkpoints.step_of(newest)
    step = replicas.sum_over_workers(strategy, 1 + step if replicas.is_chief() else 0) - 1
    if step >= 0:
        checkpoints.restore(model, checkpoints.path_of(workdir, step))
    return step >= 0


def _roll_back(config, workdir, strategy, model, error: DivergenceError) -> None:
    """Restores a checkpoint and saves it again with lower learning rates.

    It is usually the newest checkpoint. It is the one before if an earlier rollback has not helped
    and training diverged within an epoch of the newest, whose weights may have exploded and still
    be finite.

    Raises:
      UserError: config.guard allows no further rollback.
    """
    guard, count = config.guard, int(model.rollbacks.numpy())
    if not guard.enabled or count >= guard.rollbacks:
        raise UserError(
            f"training diverged: {error}, after {count} rollbacks to a checkpoint with lower "
            "learning rates; expected finite values; lower config.optimizer.learning_rate, in "
            "another --workdir; the last good checkpoint is kept"
        ) from error
    if replicas.is_chief() and count:
        epoch = min(config.log_every, config.steps)
        checkpoints.set_diverged_aside(workdir, int(model.step.numpy()) - epoch)
    _restore(model, strategy, workdir)
    model.rollbacks.assign(count + 1)
    if replicas.is_chief():
        checkpoints.save(model, workdir, config.keep_checkpoints)
    logging.warning(
        "%s; back to step %d, learning rates now %g times those of the config",
        error, int(model.step.numpy()), guard.factor ** (count + 1),
    )  # fmt: skip


class Training:
    """The callbacks and data of a run, which are kept across rollbacks to a checkpoint.

    Args:
      config: the run's config.
      workdir: the run's directory.
      strategy: the model's strategy.
      model: a compiled `AVB`.
      source: the data.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Path,
        strategy: tf.distribute.Strategy,
        model: AVB,
        source: data.Source,
    ):
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
        first = workdir / checkpoints.DIRECTORY / FIRST
        self.callbacks = [guard.Guard(config.guard.enabled, first), guard.StopAtStep(last)]
        if chief:
            held_out = pipeline.examples(source.validation, FIGURE_EXAMPLES, binary)
            labels = source.validation.labels
            labels = None if labels is None else labels[: len(held_out)]
            self.callbacks = [
                # The monitor is first, because later callbacks write what it adds to the logs.
                monitor.Monitor(
                    held_out[: config.monitor.examples],
                    config.monitor.samples,
                    config.monitor.largest_gap,
                    workdir / "logs" / "validation",
                ),
                *self.callbacks,
                progress.Progress(last),
                writing.Scalars(workdir / "logs"),
                writing.Figures(workdir, config.figures_every, last, held_out, labels),
                tensorboard.Panels(config, workdir, held_out, labels),
                tensorboard.Profile(workdir / "logs", config.profile_steps),
                writer,  # after the logs: a resumed run must not write the same logs again
            ]
        self.callbacks += [self.terminated]

    def to_the_end(self) -> None:
        """Trains from the model's current step to config.steps.

        The rest of the current epoch uses few steps per graph call and times them. Later calls have
        as many steps as fit into `CALL_SECONDS`, because SIGTERM is handled only after a call ends.
        """
        stopwatch = guard.Stopwatch()
        left = self.epoch - self._step % self.epoch
        # On a GPU the overhead of a call is as long as many steps.
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
            verbose=0,  # `progress.Progress` shows the whole run instead
        )


def create(
    config: ml_collections.ConfigDict, event_shape: tuple[int, ...], table: Table | None = None
) -> AVB:
    """Returns the compiled model of a config.

    Args:
      config: the run's config.
      event_shape: shape of one example.
      table: the table whose rows are the examples, or None.
    Raises:
      UserError: a name is unknown, or the parts do not fit each other.
    """
    keras.utils.set_random_seed(config.model.seed)  # seeds the initial weights
    with _computing_in(config.precision):
        model = assembly.build(config.method, table or event_shape, **config.model)
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
    # The adversary's optimizer counts its own steps: `adversary_steps` for each primal step.
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
    """Gives the layers created inside the block the dtype policy `policy`."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _steps_per_execution(config, seconds_per_step: float) -> int:
    """Returns the most steps per graph call that `CALL_SECONDS` and the logging period allow."""
    period = math.gcd(config.steps, min(config.log_every, config.steps))
    most = min(100, CALL_SECONDS / seconds_per_step)
    return max(n for n in range(1, 101) if period % n == 0 and n <= max(1, most))
