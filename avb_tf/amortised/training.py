"""The training of q(u|y): maximum likelihood with new simulated pairs in each step.

The mean of KL(p(u|y) || q(u|y)) over y is, up to the posterior's entropy, minus the expected log q
of simulated pairs. Every mode is simulated in proportion to its mass, so no mode is lost. No pair
is used twice, so the network cannot overfit. With a table of finished pairs it can. Then weights
are averaged over steps, and those are kept with which pairs held out have the largest log q.
"""

import math
import time
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from avb_tf.amortised.checkpoint import State, Workdir, assign
from avb_tf.amortised.network import ConditionalMixture, scaling
from avb_tf.amortised.simulation import Simulation, Table, size_of
from avb_tf.errors import UserError
from avb_tf.posteriors.training import CHUNK, Clock
from avb_tf.training import optimizers, termination

_SCALING_PAIRS = 10_000  # simulated pairs that set the locations and scales
_SCALING_NUMBERS = 2**24  # largest number of entries of their data
_SCALING_CALL = 100  # pairs in each call for them
_SCALING_SHARE = 0.05  # share of a fit's time after which fewer suffice, but not before
_FEWEST_SCALING = 50  # finite pairs
_CALL_SHARE = 0.02  # most of a fit's time between readings of the clock
_FEW_STEPS = 1000  # a warning appears if time ran out before
_LOST = 3 * CHUNK  # most steps in a row without a finite loss
_WARMUP = 0.02  # share of a stage in which its learning rate rises
_EPOCHS = 150.0  # most passes through a table of finished pairs
_FEWEST_PAIRS, _STEPS_OF_AN_EPOCH = 32, 20  # of a small table
_INTERVAL = 0.02  # progress between two log densities of the pairs held out
_HELD_OUT_CALL = 500  # of them in a batch
_WINDOW = 0.08  # progress over which weights are averaged for them


def build(simulation: Simulation, settings: dict[str, Any]) -> ConditionalMixture:
    """Returns the network of a model with initial weights, before the scaling is set."""
    q = ConditionalMixture(
        simulation.dim,
        simulation.row or simulation.features,
        settings["components"],
        settings["width"],
        settings["depth"],
        settings["trunk_width"],
        settings["trunk_depth"],
        simulation.row is not None,
        _image(simulation) if settings["filters"] else None,
        settings["filters"],
    )
    q((tf.zeros([1, simulation.dim]), tf.zeros([1, simulation.features])))
    return q


def _image(simulation):
    """Returns height, width and channels of y, those that it lacks being 1."""
    shapes = list(simulation.shapes.values())
    if simulation.row is not None or len(shapes) > 1 or not 1 <= len(shapes[0]) <= 3:
        found = "a set of rows" if simulation.row is not None else f"of shapes {shapes}"
        raise UserError(
            f"filters is above 0, but the data are {found}; expected filters=0, or one observed "
            "part [time], [height, width] or [height, width, channels]"
        )
    return [*shapes[0], 1, 1][:3]


def train(
    q: ConditionalMixture,
    simulation: Simulation,
    settings: dict[str, Any],
    clock: Clock,
    seed: int,
    workdir: Workdir,
) -> dict[str, list[float]]:
    """Trains q from its initial weights, or from the workdir's checkpoint.

    Args:
      q: network from `build`.
      simulation: the model.
      settings: settings of the fit.
      clock: clock of the fit, which decides when the training ends.
      seed: seed of the pairs, combined with the step.
      workdir: directory of checkpoints and logs.
    Returns:
      "log_q", the mean log q(u|y) in nats over the steps of each call, after the whitening's stage:
      `CHUNK` of them, or fewer if `seconds` is given and they are slow; for a table of pairs also
      "log_q_held_out", at every 50th of the training.
    Raises:
      UserError: the loss is not finite, or the checkpoint is of another training.
      SystemExit: SIGTERM has arrived inside `termination.listening`; the state is saved.
    """
    state = workdir.state()
    if state is None:
        u, y, usable = _scaling_pairs(simulation, clock, seed)
        if not usable.all():
            logging.warning(
                "%.3g%% of the simulated data sets are not finite and are left out; the posteriors "
                "of finite data remain right",
                100.0 * np.mean(~usable),
            )
        rows = y[usable].reshape(-1, simulation.row or simulation.features)
        q.standardise(scaling(u[usable], rows[np.isfinite(rows).all(1)]))
    else:
        assign(q.variables, state.weights)
        clock.step, clock.began = state.step, clock.began - state.elapsed
    by_time = clock.seconds is not None and not clock.steps
    if simulation.table is not None:
        limit = max(1, round(_EPOCHS * simulation.table.count / _pairs(simulation, settings)))
        clock.steps = min(clock.steps or limit, limit)
    whitening = q.whitening.trainable_variables
    others = [v for v in q.trainable_variables if not any(v is w for w in whitening)]
    stages = [
        _Stage(0, "log_student", q.log_student, whitening, settings["whitening_share"]),
        _Stage(1, "log_q", q.log_prob, others, 1.0),
    ]
    history = {}
    for stage in stages[state.stage if state else 0 :]:
        history = _run(stage, q, simulation, settings, clock, by_time, seed, workdir, state)
        state = None
    if clock.seconds and clock.step < min(_FEW_STEPS, clock.steps or _FEW_STEPS):
        logging.warning(
            "only %d steps of %d pairs fitted into %g seconds, too few for most models; give more "
            "seconds, or a faster model",
            clock.step,
            _pairs(simulation, settings),
            clock.seconds,
        )
    return history


def _pairs(simulation, settings) -> int:
    """Returns the number of pairs in a step; a small table has several steps in an epoch."""
    pairs = settings["batch_size"]
    if simulation.table is None:
        return pairs
    return min(pairs, max(_FEWEST_PAIRS, simulation.table.count // _STEPS_OF_AN_EPOCH))


def _scaling_pairs(simulation, clock, seed):
    """Returns u, y and which pairs are finite; fewer if the simulator is slow for the time."""
    size = sum(size_of(shape) for shape in simulation.shapes.values())
    pairs = max(_SCALING_CALL, min(_SCALING_PAIRS, _SCALING_NUMBERS // size))
    parts, began = [], 0.0
    for call in range(pairs // _SCALING_CALL):
        drawn = simulation.simulate(_SCALING_CALL, tf.constant([seed, -1 - call]))
        parts.append([np.asarray(part) for part in drawn])
        if not call:
            began = time.monotonic()  # the first call also traces the simulator
        late = clock.seconds and time.monotonic() - began > _SCALING_SHARE * clock.seconds
        if late and sum(usable.sum() for _, _, usable in parts) >= _FEWEST_SCALING:
            break
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


class _Stage(NamedTuple):
    """A stage of the training: its objective, its weights, and the progress at which it ends."""

    number: int
    name: str
    log_density: Any  # (u, y) -> [n]
    variables: list[Any]
    until: float


def _run(
    stage, q, simulation, settings, clock, by_time, seed, workdir, state
) -> dict[str, list[float]]:
    """Maximises the mean log density of simulated pairs until the end of the stage."""
    optimizer = optimizers.Adam(0.0, global_clipnorm=settings["clip_norm"])
    optimizer.build(stage.variables)
    since, history, lost = clock.progress(), [], 0
    if state is not None:
        assign(optimizer.variables, state.moments)
        since, history = state.since, state.history
    steps = _steps(stage, optimizer, simulation, _pairs(simulation, settings), seed)
    best = _Best(stage, simulation.table, state)

    def save():
        weights, moments = ([np.asarray(v) for v in x.variables] for x in (q, optimizer))
        progress = (stage.number, clock.step, clock.elapsed(), since, history)
        workdir.save(State(*progress, weights, moments, best.values, best.average, best.weights))

    count = 1 if by_time else CHUNK
    while (progress := clock.progress()) < stage.until:
        share = (progress - since) / max(1e-9, stage.until - since)
        warm = min(1.0, (share + 1e-3) / _WARMUP)
        rate = 0.5 * settings["learning_rate"] * warm * (1.0 + math.cos(math.pi * share))
        optimizer.learning_rate = rate
        began = time.monotonic()
        loss = float(steps(tf.constant(clock.step), tf.constant(count)))
        lost = 0 if math.isfinite(loss) else lost + count
        clock.step += count
        if lost > _LOST:
            raise _not_finite(clock.step - lost)
        history.append(-loss)
        clock.bar.update(int(100 * clock.progress()), [("log_q", -loss)])
        speed = count / (time.monotonic() - began)
        if by_time:
            count = min(CHUNK, max(1, int(speed * _CALL_SHARE * clock.seconds)))
        logged = {stage.name: -loss, "learning_rate": rate, "steps_per_second": speed}
        workdir.log(clock.step, logged | best.update(progress, clock.progress()))
        if workdir.due or termination.asked():
            save()
        if termination.asked():
            raise SystemExit(termination.STATUS)
    if history and not np.isfinite(history).any():
        raise _not_finite(clock.step - lost)
    best.restore()
    save()
    return {stage.name: history} | ({best.name: best.values} if best.values else {})


class _Best:
    """The averaged weights with which pairs held out from training have the largest log density.

    Without such pairs it does nothing, and the last weights remain. An exponential moving average
    has less noise than the weights themselves while the learning rate is high.
    """

    def __init__(self, stage: _Stage, table: Table | None, state: State | None):
        self.values, self.average, self.weights = (
            (state.held_out, state.average, state.kept) if state else ([], [], [])
        )
        self.name = f"{stage.name}_held_out"
        self._variables, self._table = stage.variables, table
        self._density: Any = tf.function(stage.log_density, autograph=False, reduce_retracing=True)

    def update(self, before: float, now: float) -> dict[str, float]:
        """Averages the weights, and keeps the best average, at every 50th of the progress.

        Args:
          before: the progress of the training, in [0, 1], at the last call.
          now: its progress at this one.
        Returns:
          The log density in nats by its name, or nothing.
        """
        if self._table is None:
            return {}
        own, decay = [v.numpy() for v in self._variables], math.exp((before - now) / _WINDOW)
        pairs = zip(self.average or own, own, strict=True)
        self.average = [decay * average + (1.0 - decay) * weight for average, weight in pairs]
        if int(before / _INTERVAL) == int(now / _INTERVAL):
            return {}
        assign(self._variables, self.average)
        u, y, n = *self._table[:2], _HELD_OUT_CALL
        parts = [self._density(u[i : i + n], y[i : i + n]) for i in range(0, len(u), n)]
        value = float(np.nan_to_num(np.mean(np.concatenate(parts)), nan=-np.inf))
        if value > max(self.values, default=-math.inf):
            self.weights = self.average
        self.values.append(value)
        assign(self._variables, own)
        return {self.name: value}

    def restore(self) -> None:
        """Sets the weights to the best, if any were kept."""
        if self.weights:
            assign(self._variables, self.weights)


def _not_finite(step):
    return UserError(
        f"the loss has not been finite since step {step}; expected finite data: check the model by "
        "`sample`, or lower learning_rate"
    )


def _steps(stage, optimizer, simulation, pairs, seed):
    """Returns a graph of (first, count) that takes steps and returns their mean loss.

    A step whose loss or gradient is not finite changes nothing and does not count.
    """

    def step(number):
        u, y, usable = simulation.simulate(pairs, tf.stack([seed, number]))
        with tf.GradientTape() as tape:
            densities = tf.where(usable, stage.log_density(u, y), 0.0)
            loss = -tf.reduce_sum(densities) / tf.reduce_sum(tf.cast(usable, tf.float32))
        gradients = tape.gradient(loss, [v.value for v in stage.variables])
        gradients = optimizers.gathered(gradients)
        finite = tf.math.is_finite(loss) & tf.math.is_finite(tf.linalg.global_norm(gradients))
        optimizer.apply_where(finite, gradients)
        return tf.where(finite, loss, 0.0), tf.cast(finite, tf.float32)

    @tf.function(autograph=False)
    def steps(first, count):
        def body(i, total, taken):
            loss, finite = step(first + i)
            return i + 1, total + loss, taken + finite

        _, total, taken = tf.while_loop(lambda i, *_: i < count, body, (0, 0.0, 0.0))
        return total / taken  # NaN if no step was taken

    return steps
